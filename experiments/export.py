"""Takes a run's best checkpoint elsewhere: as a NIR graph for other simulators, or as one function for JAX alone.

python experiments/export.py logs/RUN net.nir
python experiments/export.py logs/RUN net.jax -batch_size 1

The ending of the file decides. `plif_jax.interop.nir` and `plif_jax.interop.export` say what each holds and how to
load it.
"""

import io
from pathlib import Path

from plif_jax import cli, files
from plif_jax.config import Parser
from plif_jax.errors import UserError
from plif_jax.training.checkpoint import load_network


def main(argv):
    parser = Parser(description=__doc__)
    parser.add_argument("run", help="folder of the run")
    parser.add_argument("out", type=Path, help="file to write, ending in .nir or .jax")
    parser.add_argument("-checkpoint", choices=("best", "latest"), default="best", help="of the run")
    parser.add_argument("-batch_size", type=int, help="fixes the batch of a .jax file; else any")
    given = parser.parse_args(argv)
    if given.out.suffix not in (".nir", ".jax"):
        raise UserError(f"{given.out} ends in neither .nir nor .jax; the ending says what to write")
    if given.batch_size is not None and given.out.suffix == ".nir":
        raise UserError(f"-batch_size {given.batch_size}: a NIR graph has no batch; leave it out for {given.out}")
    _, net = load_network(given.run, given.checkpoint)
    write = write_nir if given.out.suffix == ".nir" else write_function
    try:
        written = write(net, given)
    except OSError as error:
        raise UserError(f"{given.out} cannot be written: {error.strerror}") from None
    print(f"{given.out}: {written}, {given.out.stat().st_size / 1e6:.1f} MB")


def write_nir(net, given):
    """Writes a NIR graph; says what it holds."""
    from plif_jax.interop.nir import to_nir  # first: it says what to install where NIR is missing

    import nir  # isort: skip

    graph = to_nir(net)
    content = io.BytesIO()
    nir.write(content, graph)
    files.write(given.out, content.getvalue())
    return f"{len(graph.nodes)} NIR nodes, a timestep of {graph.metadata['dt']:g} s, T = {net.T}"


def write_function(net, given):
    """Writes an exported function; says what it takes."""
    from plif_jax.interop import export

    return f"a function of {export.save(net, given.out, given.batch_size).in_avals[0]}"


if __name__ == "__main__":
    cli.run(main)
