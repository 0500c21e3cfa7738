"""The report's page: one jinja2 template, its style inside it, nothing fetched from anywhere."""

STYLE = """
:root { --ink: #1f2933; --soft: #616e7c; --line: #e4e7eb; --card: #ffffff; --accent: #0072b2; }
* { box-sizing: border-box; }
body { margin: 0; background: #f7f8fa; color: var(--ink);
       font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1040px; margin: 0 auto; padding: 40px 24px 80px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0; letter-spacing: -.01em; }
h2 { font-size: 20px; margin: 48px 0 12px; }
h3 { font-size: 15px; margin: 24px 0 8px; }
p { margin: 0 0 12px; } .soft { color: var(--soft); }
header { display: flex; flex-wrap: wrap; gap: 12px; align-items: center; }
header + p { margin-top: 8px; }
.badge { padding: 2px 12px; border-radius: 99px; font-size: 14px; font-weight: 600;
         background: #fff3d6; color: #7a4b00; }
.badge.good { background: #d9f2e6; color: #005c42; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); gap: 16px; }
.card, .panel { background: var(--card); border: 1px solid var(--line); border-radius: 12px; }
.card { padding: 16px 20px; border-top: 4px solid var(--accent); }
.card b { display: block; font-size: 32px; line-height: 1.25; letter-spacing: -.02em; }
.card span { color: var(--soft); font-size: 14px; display: block; }
.panel { padding: 16px 20px; margin: 0 0 16px; overflow-x: auto; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(400px, 100%), 1fr));
        gap: 16px; }
figure { margin: 0; } figcaption { font-weight: 600; margin-bottom: 8px; }
svg { width: 100%; height: auto; display: block; }
table { border-collapse: collapse; width: 100%; font-size: 15px;
        font-variant-numeric: tabular-nums; }
th, td { padding: 7px 14px 7px 0; text-align: right; border-bottom: 1px solid var(--line);
         white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
tbody tr:last-child td, tbody tr:last-child th { border-bottom: 0; }
th { font-weight: 600; } thead th { color: var(--soft); font-size: 13px; }
td small { color: var(--soft); margin-left: 4px; }
details { background: var(--card); border: 1px solid var(--line); border-radius: 12px;
          padding: 10px 18px; margin: 0 0 8px; }
summary { cursor: pointer; font-weight: 600; overflow-wrap: anywhere; }
summary .mark { display: inline-block; min-width: 4.8em; font-size: 13px; font-weight: 600; }
.wide { overflow-x: auto; margin-top: 8px; } strong { color: var(--ink); }
.right { color: #00704f; } .wrong { color: #b03a00; }
pre { font: 13.5px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; margin: 8px 0;
      white-space: pre-wrap; overflow-wrap: anywhere; background: #f7f8fa; border-radius: 8px;
      padding: 10px 14px; }
dl.keys { display: grid; grid-template-columns: max-content 1fr; gap: 2px 24px; margin: 12px 0;
          font: 13.5px/1.6 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
dl.keys dt { color: var(--soft); } dl.keys dd { margin: 0; overflow-wrap: anywhere; }
"""

TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}: report</title>
<style>{{ style }}</style>
</head>
<body>
<main>
<header><h1>{{ title }}</h1>
<span class="badge{{ ' good' if good }}">{{ status }}</span></header>
<p class="soft">{{ facts | join(" · ") }}</p>
{% macro table(rows) %}
<table>
<thead><tr>{% for name in rows.columns %}<th scope="col">{{ name }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in rows.cells %}
<tr><th scope="row">{{ row[0] }}</th>{% for cell in row[1:] %}
<td>{{ cell.text }}{% if cell.note %}<small>{{ cell.note }}</small>{% endif %}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table>
{% endmacro %}
{% macro chart(caption, svg) %}
<figure class="panel" role="img" aria-label="{{ caption }}">
<figcaption>{{ caption }}</figcaption>{{ svg }}</figure>
{% endmacro %}
{% for set in sets %}
<h2>{{ "Accuracy" if set.cards else "Evaluation" }} on {{ set.name }}</h2>
{% if set.cards %}
<div class="cards">
{% for card in set.cards %}
<div class="card" style="--accent: {{ card.color }}"><span>{{ card.stage }}</span>
<b>{{ card.value }}</b><span>{{ card.note }}</span></div>
{% endfor %}
</div>
<p></p>
{{ chart(set.metric ~ " of each stage, 95 % bootstrap interval over problems", set.by_stage) }}
<div class="pair">
{% if set.by_group %}
{{ chart(set.metric ~ " by number of operations", set.by_group) }}
{% endif %}
{{ chart(set.metric ~ " against mean tokens", set.by_tokens) }}
</div>
{% endif %}
<div class="panel">{{ table(set.table) }}</div>
{% endfor %}
{% if stages.cells %}
<h2>Stages</h2>
<div class="panel">{{ table(stages) }}</div>
{% endif %}
{% if losses %}
<h2>Loss</h2>
{{ chart("Training loss of each stage: as logged, and its moving average", losses) }}
{% endif %}
{% if learning %}
<h2>Reinforcement learning</h2>
{% for figure in learning %}
{{ chart(figure.stage ~ ": as logged, and the moving average", figure.svg) }}
{% endfor %}
{% endif %}
{% for bench in scaling %}
<h2>Test-time scaling of {{ bench.stage }} on {{ bench.set }}</h2>
<p class="soft">What the tokens spent on a problem buy, with 95 % bootstrap intervals over
problems.</p>
<div class="pair">
{% if bench.by_samples %}
{{ chart("More samples: accuracy against tokens", bench.by_samples) }}
{% endif %}
{% if bench.by_thinking %}
{{ chart("More or less thinking: accuracy against tokens", bench.by_thinking) }}
{% endif %}
</div>
{% if bench.s1.cells %}
<div class="panel">{{ table(bench.s1) }}</div>
{% endif %}
<details><summary>{{ bench.table.cells | length }} points</summary>
<div class="wide">{{ table(bench.table) }}</div></details>
{% endfor %}
{% if samples %}
<h2>Samples</h2>
<p class="soft">The first right and wrong completions of each stage, as they were sampled.</p>
{% for group in samples %}
<h3>{{ group.stage }} on {{ group.set }}</h3>
{% for s in group.samples %}
<details>
<summary><span class="mark {{ 'right' if s.correct else 'wrong' }}">
{{ "✓ right" if s.correct else "✗ wrong" }}</span> {{ s.prompt | trim | truncate(90) }}
<span class="soft">{{ s.num_tokens }} tokens{{ ", cut off" if s.truncated }}</span></summary>
<p class="soft">prompt</p><pre>{{ s.prompt }}</pre>
<p class="soft">completion</p><pre>{{ s.text }}</pre>
<p class="soft">right answer</p><pre>{{ s.answer }}</pre>
</details>
{% endfor %}
{% endfor %}
{% endif %}
{% if rollouts %}
<h2>Groups of completions</h2>
<p class="soft">The best and the worst groups of the last steps' rollouts, with their rewards.</p>
{% for rollout in rollouts %}
<h3>{{ rollout.stage }}</h3>
{% for group in rollout.groups %}
<details>
<summary><span class="mark">{{ "%.2f" | format(group.mean) }}</span>
{{ group.prompt | trim | truncate(90) }}
<span class="soft">step {{ group.step }}, {{ group.completions | length }} completions, rewards
{{ "%.2f" | format(group.rewards | min) }} to {{ "%.2f" | format(group.rewards | max) }}</span>
</summary>
<p class="soft">prompt</p><pre>{{ group.prompt }}</pre>
<p class="soft">right answer</p><pre>{{ group.answer }}</pre>
{% for c in group.completions %}
<p class="soft"><strong>{{ "%.2f" | format(c.reward) }}</strong>
{% for name, value in c.rewards.items() %}· {{ name }} {{ "%.2f" | format(value) }} {% endfor %}
· {{ c.num_tokens }} tokens{{ ", cut off" if c.truncated }}</p><pre>{{ c.text }}</pre>
{% endfor %}
</details>
{% endfor %}
{% endfor %}
{% endif %}
<h2>Configuration</h2>
<details><summary>{{ config | length }} values of config.json</summary>
<dl class="keys">
{% for name, value in config %}<dt>{{ name }}</dt><dd>{{ value }}</dd>
{% endfor %}
</dl></details>
</main>
</body>
</html>
"""
