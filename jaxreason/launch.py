"""python -m jaxreason.launch --config=FILE[:ARG] --workdir=DIR --config.KEY=VALUE ...

FILE is a path, or the name of a file in ./configs or of a shipped config (default quickstart). The
workdir defaults to runs/NAME. Re-running the same command resumes. Exit codes: 0 done, 2 a mistake
in what was asked (one line says which), 143 stopped by SIGTERM with everything saved.

On several hosts the same command is run on each, by srun, mpirun or a JobSet (launch/README.md).
"""

import ast
import difflib
import importlib.util
import os
import pathlib
import signal
import sys
import traceback

from ml_collections import ConfigDict

from jaxreason.parallel import hosts, launchers
from jaxreason.parallel.allocator import keep_freed_memory

_PLAIN = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    tuple: "a tuple, as in '(1, 2)'",
    list: "a list, as in '[1, 2]'",
}
RECIPES = {  # -> module
    "pipeline": "pipeline",
    "fit": "pipeline",
    "rl": "pipeline",
    "evaluate": "evaluate",
    "generate": "generate",
    "study": "study",
}


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if any(arg in ("-h", "--help") for arg in argv):
        print(__doc__ + "\nShipped configs: " + ", ".join(shipped_configs()))
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the training loop saves first
    code = 1
    try:
        code = _run(argv)
    except SystemExit as left:
        code = left.code
        raise
    except Exception:
        if not hosts.several():
            raise
        traceback.print_exc()
    finally:
        if code:
            hosts.leave(code)
    return code


def _run(argv: list[str]) -> int:
    """The exit code. Raises what is no mistake of the user's."""
    try:
        config, folder = read_command(argv)
        importlib.import_module("jaxreason.recipes.defaults").check_keys(config)
        set_up_jax(config)
        recipe = importlib.import_module(f"jaxreason.recipes.{RECIPES[config.recipe]}")
        recipe.run(config, folder)
    except (ValueError, RuntimeError) as error:
        lost = hosts.is_loss_of_peer(error)
        if not (lost or isinstance(error, ValueError)):
            raise
        who = f"process {hosts.index()}: " if hosts.several() else ""
        print(f"error: {who}{' '.join(str(error).split())}", file=sys.stderr)
        if os.environ.get("JAXREASON_TRACEBACK"):
            traceback.print_exc()
        if not lost:
            return 2
        if hosts.several():  # else they have never met
            print("another process ended; the newest checkpoint is whole: run the same command "
                  "again in all", file=sys.stderr)  # fmt: skip
        return 1
    return 0


def read_command(argv: list[str]) -> tuple[ConfigDict, pathlib.Path]:
    """The configuration with its overrides, and the workdir. Raises ValueError."""
    spec, workdir, overrides = "quickstart", None, []
    for arg in argv:
        flag, equals, value = arg.partition("=")
        if not equals or not flag.startswith("--"):
            raise ValueError(f"{arg!r} is no flag; write --config=FILE[:ARG], --workdir=DIR or "
                             "--config.KEY=VALUE")  # fmt: skip
        if flag == "--config":
            spec = value
        elif flag == "--workdir":
            workdir = value
        elif flag.startswith("--config."):
            overrides.append((flag.removeprefix("--config."), value))
        else:
            raise ValueError(f"unknown flag {flag}; there are --config, --workdir and --config.KEY")
    config = load_config(spec)
    for key, value in overrides:
        override(config, key, value)
    if config.recipe not in RECIPES:
        raise ValueError(f"recipe is {config.recipe!r}; it must be one of {', '.join(RECIPES)}")
    return config, pathlib.Path(workdir or f"runs/{config.name}").expanduser()


def shipped_folders() -> list[pathlib.Path]:
    """Where the installed package keeps its configs; none in a checkout that is not installed."""
    spec = importlib.util.find_spec("jaxreason.configs")
    return [pathlib.Path(folder) for folder in spec.submodule_search_locations] if spec else []


def shipped_configs() -> list[str]:
    return sorted(p.stem for folder in shipped_folders() for p in folder.glob("[a-z]*.py"))


def load_config(spec: str) -> ConfigDict:
    """`get_config(ARG)` of the file; looked for here, in ./configs, then among the shipped ones.

    Raises ValueError naming the places that were searched.
    """
    name, _, arg = spec.partition(":")
    stem = name.removesuffix(".py")
    places = [pathlib.Path(f"{stem}.py"), pathlib.Path("configs") / f"{stem}.py"]
    places += [folder / f"{stem}.py" for folder in shipped_folders()]
    path = next((p for p in places if p.is_file()), None)
    if path is None:
        raise ValueError(
            f"--config={spec}: no such config (looked at {', '.join(map(str, places))}; "
            f"shipped: {', '.join(shipped_configs())})"
        )
    module_spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return module.get_config(arg)


def override(config: ConfigDict, key: str, text: str) -> None:
    """Set one key from the command line.

    Raises ValueError for an unknown key (with the nearest known one) or a value of another type.
    """
    node, parts = config, key.split(".")
    for i, part in enumerate(parts):
        if not isinstance(node, ConfigDict) or part not in node:
            known = list(node) if isinstance(node, ConfigDict) else []
            near = difflib.get_close_matches(part, known, n=1)
            where = ".".join(parts[:i]) or "the config"
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known) or 'none'}"
            raise ValueError(f"unknown key --config.{key}: {where} has no {part!r}; {hint}")
        if i < len(parts) - 1:
            node = node[part]
    name, old = parts[-1], node[parts[-1]]
    if isinstance(old, ConfigDict):
        node[name] = _parse_section(key, text, old)
        return
    wanted = node.get_type(name)
    node[name] = _parse(key, text, wanted)


def _parse_section(key: str, text: str, old: ConfigDict) -> ConfigDict:
    """Of a section without keys of its own, whose names are the user's."""
    if old:
        raise ValueError(f"--config.{key} is a section; set one of its keys: {', '.join(old)}")
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = None
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"--config.{key}={text} is no section; write it as in {{'name': 1}}")
    return ConfigDict(value)


def _parse(key: str, text: str, wanted: type) -> object:
    if wanted is str:
        return text
    if wanted is bool and text in ("true", "false"):
        return text == "true"
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    if wanted is type(None):  # the config says nothing of its type
        return value
    if wanted is float and type(value) is int:
        return float(value)
    if wanted in (tuple, list) and isinstance(value, (tuple, list)):
        return wanted(value)
    if type(value) is not wanted:
        raise ValueError(
            f"--config.{key}={text} is a {type(value).__name__}; it must be {_PLAIN[wanted]}"
        )
    return value


def set_up_jax(config: ConfigDict) -> None:
    """What must be said before the first device is touched. Raises ValueError, or LostPeer."""
    keep_freed_memory()
    if config.run.deterministic:
        flag = "--xla_gpu_deterministic_ops=true"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
    import jax

    given = config.run.processes.to_dict()
    limits = {name: given.pop(name) for name in ("heartbeat", "patience")}
    for name, seconds in limits.items():
        if seconds < 1:
            raise ValueError(f"run.processes.{name} is {seconds}; it must be at least 1")
    if (processes := launchers.detect(os.environ, **given)) is not None:
        hosts.connect(processes, **limits)
    if config.run.compilation_cache and not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        folder = os.path.expanduser(config.run.compilation_cache)
        jax.config.update("jax_compilation_cache_dir", folder)


if __name__ == "__main__":
    sys.exit(main())
