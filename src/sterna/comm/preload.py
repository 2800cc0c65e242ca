"""What the fork server loads once, so that no worker has to.

Torch imports its compiler front end, seconds of work, when the first optimizer is made; so it belongs
here. Importing starts no thread, which makes forking safe. Modules above this layer are named, not
imported: the server loads them where they are there.
"""

import contextlib
import importlib

for _name in (
    "torch",
    "torch._dynamo",
    "torch.distributed",
    "torch.utils.tensorboard",
    "sterna.runs.worker",
):
    with contextlib.suppress(ImportError):
        importlib.import_module(_name)
