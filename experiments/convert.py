"""Converts weights: runs, checkpoints of the paper's authors and of SpikingJelly 2, state dicts, NumPy archives.

python experiments/convert.py logs/RUN weights.pt              a run's best checkpoint, as a PyTorch state dict
python experiments/convert.py check_point_max.pt weights.npz   an authors' checkpoint, as plain arrays
python experiments/convert.py weights.npz weights.pt           between the two

Names and layouts are PyTorch's throughout. Nothing that a file names is run; writing .pt needs PyTorch.
"""

from pathlib import Path

from plif_jax import cli
from plif_jax.config import Parser
from plif_jax.errors import UserError
from plif_jax.interop import torch, torch_files
from plif_jax.training.checkpoint import load_network


def main(argv):
    parser = Parser(description=__doc__)
    parser.add_argument("source", metavar="IN", help="folder of a run, .pt, .pth or .npz")
    parser.add_argument("target", metavar="OUT", help=".npz, .pt or .pth")
    parser.add_argument("-checkpoint", choices=("best", "latest"), help="of a run (default best)")
    given = parser.parse_args(argv)
    if Path(given.source).is_dir():
        arrays = torch.state_dict(load_network(given.source, given.checkpoint or "best")[1])
    elif given.checkpoint:
        raise UserError(f"-checkpoint {given.checkpoint} is of a run; {given.source} is a file, and has one state")
    else:
        arrays = torch_files.read(given.source).arrays
    torch_files.write(given.target, arrays)
    print(f"{given.target}: {len(arrays)} arrays, {sum(array.size for array in arrays.values()):,} numbers")


if __name__ == "__main__":
    cli.run(main)
