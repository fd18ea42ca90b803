"""Program: `loratory ...` where accelerate shards on the CPU too.

accelerate turns FSDP on only where there is a GPU; everything it then does runs on gloo as well, so this sets what it would set.
"""

import sys
from typing import Any

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

usual = AcceleratorState.__init__


def with_fsdp(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
    usual(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    plugin = fsdp_plugin or self.__dict__.get("fsdp_plugin")  # every further call is the same state again
    if plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.FSDP
        self.fsdp_plugin = plugin


AcceleratorState.__init__ = with_fsdp

if __name__ == "__main__":
    from loratory.cli import main

    sys.exit(main())
