"""Says what there is of a data set, and draws a few samples into NAME.png in the working directory.

python -m plif_jax.data check NAME
python -m plif_jax.data check NAME -data_root DATA
"""

import sys

from plif_jax import cli
from plif_jax.catalog import DATASETS
from plif_jax.config import Parser
from plif_jax.data.check import check


def main(argv):
    """Says what there is of the data set that the flags name."""
    parser = Parser(prog="python -m plif_jax.data", description=__doc__)
    parser.add_argument("command", choices=["check"], help="say what there is, and draw")
    parser.add_argument("name", metavar="NAME", help=", ".join(DATASETS))
    parser.add_argument("-data_root", help="the folder with your data sets")
    parser.add_argument("-cache_dir", help="the folder for downloads; default: $PLIF_JAX_CACHE or ~/.cache/plif_jax")
    arguments = parser.parse_args(argv)
    print(check(arguments.name, arguments.data_root, arguments.cache_dir))


if __name__ == "__main__":
    sys.argv[0] = "plif_jax.data"  # who speaks in an error
    cli.run(main)
