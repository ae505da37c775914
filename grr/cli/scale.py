"""The command scale: time, memory, communication and reading of a training run, before its GPUs are rented."""

import argparse
from functools import partial
from typing import Any

from grr.cli.parser import add_command
from grr.experiments import catalog

SECTIONS = {"run", "model", "tokenizer", "loss", "parallel"}  # of a training that this command knows


def add_scale(subparsers: Any) -> None:
    parser = add_command(
        subparsers,
        scale,
        "scale",
        "Print what a training run would cost on any number of GPUs.",
        """
        Seconds, memory, messages and images of a step, and what bounds it. FLOPs, memory and messages are counted from
        the model of the config; rates are assumptions, which the table ends with and assume.KEY=VALUE replaces.
        Neither a GPU nor data is needed.

          grr scale pretrain/cc12m_grr
          grr scale pretrain/cc12m_grr --gpus 8,64 run.batch_size=4096 run.micro_batch_size=null
          grr scale pretrain/cc12m_grr --gpus 1024 parallel.dp_replicate=128 run.batch_size=32768 assume.reached=0.3

        Next: grr check pretrain/cc12m_grr
        """,
    )
    parser.add_argument("config", metavar="CONFIG", help="a file, or a name that grr ls prints")
    parser.add_argument("overrides", metavar="section.key=value", nargs="*", help="values that replace the file's")
    parser.add_argument(
        "--recipe", metavar="NAME|FILE", help="the config's recipe; default: by its folder, configs/<recipe>/"
    )
    gpus, pairs = [1, 8, 64, 1024], [10**7, 4 * 10**8, 5 * 10**9]
    parser.add_argument(
        "--gpus", metavar="N,N", type=_numbers, default=gpus, help="a column for each; default: 1,8,64,1024"
    )
    parser.add_argument(
        "--pairs", metavar="N,N", type=_numbers, default=pairs, help="sizes of data; default: 10e6,400e6,5e9"
    )


def scale(options: argparse.Namespace) -> int:
    """Print a table with a column for each number of GPUs, a table of data, and the assumptions."""
    from grr.config.help import reference
    from grr.evaluation.scale import Assumptions
    from grr.reports.table import aligned

    cfg = _config(options)
    assumed, parallel = Assumptions(**cfg.assume), cfg.parallel
    found, refused = _estimates(cfg, options.gpus, assumed)
    if found:
        one = next(iter(found.values()))
        parameters = sum(p.numel() for p in one.model.meta.parameters())
        print(
            f"{cfg.model['name']}: {parameters:,} parameters, {cfg.run['batch_size']:,} pairs a step, texts of "
            f"{one.model.columns} tokens, {'bf16' if parallel['bf16'] else 'fp32'}\n\n"
            f"{aligned(_steps(found, options.pairs, assumed))}\n"
        )
    print("".join(f"{line}\n\n" for line in refused), end="")
    print(f"{aligned(_data(options.pairs, assumed))}\n\nassumed, not measured:")
    given = {"assume": {key: (value, "") for key, value in cfg.assume.items()}}
    print("\n".join(reference({"assume": Assumptions}, given).splitlines()[2:]))
    return 0 if found else 1


def _config(options: argparse.Namespace) -> Any:
    """Returns the config of a pre-training, with a section of assumptions, and the sizes of its tokenizer."""
    from grr import config
    from grr.cli.check import recipe_sections
    from grr.cli.sizes import with_tokenizer
    from grr.evaluation.scale import Assumptions

    file = catalog.config_file(options.config)
    recipe = catalog.recipe_of(file, options.recipe)
    sections, _ = recipe_sections(recipe)
    if missing := sorted(SECTIONS - sections.keys()):
        raise ValueError(
            f"scale: the config must be one of pre-training, got one of {recipe.stem}, which has no section "
            f"{', '.join(missing)}; try grr scale pretrain/cc12m_grr"
        )
    cfg = config.load({**sections, "assume": Assumptions}, ["--config", str(file), *options.overrides])
    cfg.model = with_tokenizer(cfg.model, cfg.tokenizer)
    return cfg


def _estimates(cfg: Any, counts: list[int], assumed: Any) -> tuple[dict[int, Any], list[str]]:
    """Returns a step for each number of GPUs, and why there is none for others."""
    from grr.evaluation.scale import Model, Run, estimate
    from grr.models.builders import MODELS

    build = partial(MODELS[cfg.model["name"]], **cfg.arguments("model"))
    options = {key: cfg.parallel[key] for key in ("bf16", "activation_checkpointing")}
    model = Model(build, cfg.model["image_size"], assumed.columns or cfg.model["context_length"], **options)
    micro, kept = cfg.run["micro_batch_size"], cfg.parallel["keep_gathered"]
    divided = {"dp_replicate": cfg.parallel["dp_replicate"], "keep_gathered": kept is True, "bf16": options["bf16"]}
    loss = {key: cfg.loss[key] for key in ("contrastive", "negatives")}
    found, refused = dict[int, Any](), list[str]()
    for gpus in counts:
        try:
            run = Run(gpus, cfg.run["batch_size"], micro or 1, **divided, **loss)
            found[gpus] = estimate(model, run, assumed, choose=micro is None, decide=kept is None)
        except ValueError as error:
            refused.append(f"{gpus:,} GPUs: {error}")
    return found, refused


def _steps(found: Any, sizes: list[int], assumed: Any) -> list[list[str]]:
    """A column for each number of GPUs."""
    from grr.reports.charts import number

    columns = [["GPUs", *(f"{gpus:,}" for gpus in found)]]

    def row(name: str, value: Any) -> None:
        columns.append([name, *(str(value(one)) for one in found.values())])

    def amount(value: float) -> str:
        return number(value) if value else "-"

    row("pairs a GPU = micro-batches x pairs", lambda e: _division(e.run))
    row("whole weights are kept", lambda e: "-" if e.run.gpus == 1 else "yes" if e.run.keep_gathered else "no")
    row("TFLOP a GPU", lambda e: amount(e.flops / 1e12))
    for name in ("computing", "sending", "reading"):
        row(f"seconds of {name}", lambda e, name=name: amount(e.seconds[name]))
    row("bound by", lambda e: e.bound)
    row("seconds a step, all hidden behind it", lambda e: amount(e.step))
    row("seconds a step, sending not hidden", lambda e: amount(e.exposed))
    for pairs in sizes:
        row(f"hours an epoch of {_short(pairs)} pairs", lambda e, pairs=pairs: amount(e.hours(pairs)))
    for name in dict.fromkeys(part for e in found.values() for part in e.memory):
        row(f"GB of {name}", lambda e, name=name: amount(e.memory.get(name, 0) / 1e9))
    row("GB in all", lambda e: amount(sum(e.memory.values()) / 1e9))
    for name in dict.fromkeys(kind for e in found.values() for kind in e.messages):
        row(f"MB sent: {name}", lambda e, name=name: amount(e.sent.get(name, 0) / 1e6))
    row("images a second, all GPUs", lambda e: f"{e.run.batch_size / e.step:,.0f}")
    row("cores a GPU that read them", lambda e: amount(e.run.batch_size / e.run.gpus / e.step / assumed.images))
    return columns


def _data(sizes: list[int], assumed: Any) -> list[list[str]]:
    """A row for each size of data."""
    from grr.evaluation.scale import index_bytes
    from grr.reports.charts import number

    rows = [["pairs", "images, TB", "index, GB a host", "index, GB a process of a split"]]
    for pairs in sizes:
        shared, own = index_bytes(pairs, assumed.text_bytes)
        sizes_of = (pairs * assumed.image_bytes / 1e12, shared / 1e9, own / 1e9)
        rows.append([_short(pairs), *map(number, sizes_of)])
    return rows


def _division(run: Any) -> str:
    return f"{run.micro_batches * run.micro_batch_size:,} = {run.micro_batches:,} x {run.micro_batch_size:,}"


def _short(pairs: int) -> str:
    return f"{pairs / 1e9:g} B" if pairs >= 10**9 else f"{pairs / 1e6:g} M"


def _numbers(words: str) -> list[int]:
    """Read numbers such as 8,64 or 10e6,5e9, as the type of an argument."""
    try:
        numbers = [int(float(word)) for word in words.split(",")]
    except (ValueError, OverflowError):
        numbers = [0]
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"must be numbers from 1 on, with commas between them, got {words}")
    return numbers
