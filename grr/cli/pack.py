"""The command pack: data rewritten at the training size."""

import argparse
from pathlib import Path
from shlex import quote
from typing import Any

from grr.cli.parser import add_command, integer
from grr.experiments import catalog
from grr.files.printable import printable

SHOWN = 3  # bad images


def add_pack(subparsers: Any) -> None:
    parser = add_command(
        subparsers,
        pack_data,
        "pack",
        "Rewrite data as shards of small images, which decode faster.",
        """
        Reads the data of a config, image files or shards, and writes tar shards of JPEG files whose shorter side is the
        training size, with the captions; the format webdataset reads them. A pack that was interrupted continues when
        the same command is run again.

          grr pack pretrain/cc12m_grr data.shards='/data/cc12m/*.tar' data.split=null --output /data/packed
          grr pack recipes/configs/pretrain/photos.yaml data.path=my_photos --output packed/train
          grr pack pretrain/photos validation.path=my_photos --section validation --output packed/validation

        Next: grr run pretrain/cc12m_grr data.shards='/data/packed/*.tar' validation.shards='/data/packed/*.tar'
        """,
    )
    parser.add_argument("config", metavar="CONFIG", help="a file, or a name that grr ls prints")
    parser.add_argument("overrides", metavar="section.key=value", nargs="*", help="values that replace the file's")
    parser.add_argument("--output", metavar="FOLDER", required=True, help="an empty folder, or one of the same pack")
    parser.add_argument("--section", metavar="NAME", default="data", help="of the config; default: data")
    parser.add_argument("--size", type=integer, metavar="PIXELS", help="default: model.image_size, or 288")
    parser.add_argument(
        "--quality", type=integer, metavar="Q", default=90, help="of the JPEG files, 1 to 95; default: 90"
    )
    parser.add_argument(
        "--squash", action="store_true", help="store squares, for the crop squash alone; default: the shape is kept"
    )


def pack_data(options: argparse.Namespace) -> int:
    """Write the data of a config's section as shards and print the counts."""
    from grr.cli.check import data_sections, read_config
    from grr.config.spelling import did_you_mean
    from grr.data.formats.pack import check_pack, pack

    file = catalog.config_file(options.config)
    cfg, sections = read_config(file, options.overrides, catalog.recipe_of(file))
    known = data_sections(cfg, sections)
    if options.section not in known:
        names = ", ".join(known) or "none, because this recipe reads no data"
        hint = did_you_mean(options.section, known)
        raise ValueError(
            f"pack: --section must be a section of data, got {options.section}{hint}; those of {file} are {names}"
        )
    size = vars(cfg).get("model", {}).get("image_size", 288) if options.size is None else options.size
    check_pack(size=size, quality=options.quality)  # before the data are read
    folder = Path(options.output)
    pairs = cfg.build(options.section)
    counts = pack(pairs, folder, size=size, quality=options.quality, squash=options.squash)
    print(f"{folder}: {counts.pairs:,} pairs of {counts.images:,} images")
    if counts.bad:
        print(f"left out: {counts.skipped:,} pairs of {len(counts.bad):,} images that cannot be read:")
        for name, reason in counts.bad[:SHOWN]:
            print(f"  {printable(name)}: {printable(reason)}")
    shards = quote(f"{options.output}/*.tar")
    print(f"next: grr run ... {options.section}.name=webdataset {options.section}.shards={shards}")
    return 0
