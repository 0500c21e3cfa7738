"""The policy gradient from the papers' formulas: float64, one token at a time, nothing packed.

It shares no code with jaxreason. A sequence is a dict of float64 arrays over its completion tokens.
"""

import math

import numpy as np

# --- advantages -----------------------------------------------------------------------------------


def whiten(arrays, masks):
    """Mean 0, variance 1 over the learnt tokens of all sequences."""
    everything = [x for a, m in zip(arrays, masks) for x, keep in zip(a, m) if keep]
    if not everything:
        return [np.zeros(len(a)) for a in arrays]
    mean = math.fsum(everything) / len(everything)
    variance = math.fsum((x - mean) ** 2 for x in everything) / len(everything)
    scale = 1 / math.sqrt(max(variance, 1e-8))
    return [np.where(m, (a - mean) * scale, 0.0) for a, m in zip(arrays, masks)]


def token_rewards(sequence, reward, k1):
    """The reward at the last learnt token, minus k1 times the log-ratio at every learnt one."""
    learnt = [t for t, keep in enumerate(sequence["mask"]) if keep]
    rewards = np.zeros(len(sequence["mask"]))
    for t in learnt:
        rewards[t] -= k1 * (sequence["old"][t] - sequence["ref"][t])
    if learnt:
        rewards[learnt[-1]] += reward
    return rewards


def gae(sequence, rewards, values, gamma, lam):
    """A_t = sum over k of (gamma lam)^k delta_{t+k}, over the learnt tokens alone."""
    learnt = [t for t, keep in enumerate(sequence["mask"]) if keep]
    deltas = []
    for i, t in enumerate(learnt):
        after = values[learnt[i + 1]] if i + 1 < len(learnt) else 0.0
        deltas.append(rewards[t] + gamma * after - values[t])
    out = np.zeros(len(rewards))
    for i, t in enumerate(learnt):
        out[t] = sum((gamma * lam) ** k * d for k, d in enumerate(deltas[i:]))
    return out


def group_advantages(estimator, rewards_R, everyone, eps):
    mean = sum(rewards_R) / len(rewards_R)
    deviation = lambda xs: math.sqrt(sum((x - sum(xs) / len(xs)) ** 2 for x in xs) / (len(xs) - 1))
    if estimator == "grpo":
        return [(x - mean) / (deviation(rewards_R) + eps) for x in rewards_R]
    if estimator == "batch":
        return [(x - mean) / (deviation(everyone) + eps) for x in rewards_R]
    if estimator == "rloo":
        return [x - (sum(rewards_R) - x) / (len(rewards_R) - 1) for x in rewards_R]
    return [x - mean for x in rewards_R]


def advantages(estimator, rewards_QR, sequences, k1=0.0, gamma=1.0, lam=1.0, eps=1e-6):
    """(one array a sequence, the same of returns or None)."""
    flat, masks = list(np.reshape(rewards_QR, -1)), [s["mask"] > 0 for s in sequences]
    if estimator == "reinforce_pp":
        raw = []
        for sequence, reward in zip(sequences, flat):
            rewards = token_rewards(sequence, reward, k1)
            n = len(rewards)
            raw.append(gae(sequence, rewards, np.zeros(n), gamma, 1.0))
        return whiten(raw, masks), None
    if estimator == "gae":
        raw = [gae(s, token_rewards(s, reward, k1), s["old_values"], gamma, lam)
               for s, reward in zip(sequences, flat)]  # fmt: skip
        returns = [a + s["old_values"] * s["mask"] for a, s in zip(raw, sequences)]
        return whiten(raw, masks), returns
    for i, s in enumerate(sequences):
        flat[i] -= k1 * sum((s["old"] - s["ref"]) * s["mask"])
    size = np.shape(rewards_QR)[1]
    each = []
    for start in range(0, len(flat), size):
        each += group_advantages(estimator, flat[start : start + size], flat, eps)
    spread = [np.where(m, a, 0.0) for a, m in zip(each, masks)]
    return (whiten(spread, masks) if estimator == "reinforce_pp_baseline" else spread), None


# --- the loss -------------------------------------------------------------------------------------


def bounded(x):
    return min(max(x, -20.0), 20.0)


def surrogate(spec, A, r, logp):
    """(loss of a token, its derivative by the token's log-prob)."""
    clip = spec.get("clip", "ppo")
    if clip == "none":
        return -A * r, -A * r
    if clip == "cispo":
        weight = min(r, spec["cap"])
        return -weight * A * logp, -weight * A
    free, held = -A * r, -A * min(max(r, 1 - spec["low"]), 1 + spec["high"])
    loss, slope = (free, free) if free >= held else (held, 0.0)
    if clip == "dual" and A < 0 and loss > -A * spec["delta"]:
        loss, slope = -A * spec["delta"], 0.0
    return loss, slope


def kl_and_slope(kind, d):
    inside = abs(d) < 20
    d = bounded(d)
    if kind == "k2":
        return d * d / 2, d * inside
    return math.exp(-d) + d - 1, (1 - math.exp(-d)) * inside


def correction(spec, sequence):
    """One factor a token, from the sampler's and the trainer's log-probs before the update."""
    kind = spec.get("correction", "none")
    low, high = spec.get("is_min", 0.0), spec.get("is_max", math.inf)
    n = len(sequence["mask"])
    if kind == "none":
        return [1.0] * n
    d = [bounded(a - b) * m for a, b, m in
         zip(sequence["old"], sequence["roll"], sequence["mask"])]  # fmt: skip
    own, count = [math.exp(x) for x in d], max(sum(sequence["mask"]), 1)
    whole, mean = math.exp(bounded(sum(d))), math.exp(sum(d) / count)
    return {
        "token_truncate": [min(max(x, low), high) for x in own],
        "token_mask": [x if low <= x <= high else 0.0 for x in own],
        "sequence_truncate": [min(max(whole, low), high)] * n,
        "sequence_mask": [whole if low <= whole <= high else 0.0] * n,
        "geometric_mask": [x if low <= mean <= high else 0.0 for x in own],
    }[kind]


def loss_and_gradients(spec, sequences, advantages, returns=None, entropy_coef=0.0):
    """(loss, {"logp", "entropy", "values": one gradient array a sequence}, per-token means)."""
    learnt = [s for s in sequences if sum(s["mask"])]
    num_tokens = sum(sum(s["mask"]) for s in sequences)
    total, gradients = 0.0, {"logp": [], "entropy": [], "values": []}
    means = dict.fromkeys(("policy_loss", "entropy", "ratio/mean", "kl", "value_loss"), 0.0)
    for number, (s, A_T) in enumerate(zip(sequences, advantages)):
        n = sum(s["mask"])
        share = {
            "token": lambda: 1 / num_tokens,
            "sequence": lambda: 1 / n / len(learnt),
            "constant": lambda: 1 / (len(learnt) * spec["max_length"]),
        }[spec["mean"]]
        for rows in gradients.values():
            rows.append(np.zeros(len(s["mask"])))
        d = [bounded(a - b) * m for a, b, m in zip(s["logp"], s["old"], s["mask"])]
        rho = correction(spec, s)
        for t in [t for t, keep in enumerate(s["mask"]) if keep]:
            r = math.exp(sum(d) / n if spec.get("ratio") == "sequence" else d[t])
            policy, slope = surrogate(spec, A_T[t], r, s["logp"][t])
            if abs(s["logp"][t] - s["old"][t]) > 20 and spec.get("clip") != "cispo":
                slope = 0.0
            k, k_slope = kl_and_slope(spec.get("kl", "k3"), s["logp"][t] - s["ref"][t])
            beta = spec.get("beta", 0.0)
            loss = rho[t] * policy + beta * k - entropy_coef * s["entropy"][t]
            total += share() * loss
            gradients["logp"][number][t] = share() * (rho[t] * slope + beta * k_slope)
            gradients["entropy"][number][t] = -share() * entropy_coef
            measured = {"policy_loss": rho[t] * policy, "entropy": s["entropy"][t],
                        "ratio/mean": r, "kl": k}  # fmt: skip
            if returns is not None:
                value, value_slope = value_loss(spec, s, t, returns[number][t])
                total += spec["value_coef"] * value / num_tokens
                gradients["values"][number][t] = spec["value_coef"] * value_slope / num_tokens
                measured["value_loss"] = value
            for name, x in measured.items():
                means[name] += x / num_tokens
    return total, gradients, means


def value_loss(spec, s, t, target):
    v, old, e = s["values"][t], s["old_values"][t], spec.get("value_clip", math.inf)
    near = old + min(max(v - old, -e), e)
    free, held = (v - target) ** 2, (near - target) ** 2
    if free >= held:
        return 0.5 * free, v - target
    return 0.5 * held, (near - target) * (abs(v - old) < e)
