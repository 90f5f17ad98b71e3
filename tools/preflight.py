"""Ask whether the ranks of a job are fit to train together: their code, GPUs, network, clocks and disks.

A run asks this itself before its first step, with more: its configuration, its data, and space for its checkpoints.
"""

import argparse
import faulthandler
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from megarq import cli
from megarq.config.faults import FaultConfig
from megarq.config.preflight import PreflightConfig
from megarq.engine.preflight import Preflight
from megarq.errors import ConfigError
from megarq.launch.disks import check_folder
from megarq.launch.environment import read_environment
from megarq.launch.gather import Gather
from megarq.launch.process_group import joined, rank_device
from megarq.parallel.topology import ProcessGroups, Topology

EXAMPLE = """example:
  launchers/slurm/submit.sh preflight --nodes=8 -- --output runs/t2i --data codes tokenizer.json --min-bandwidth 20
  torchrun --nproc_per_node 8 tools/preflight.py --tp 8"""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, metavar="RUN", help="a folder that all ranks must be able to write to")
    parser.add_argument("--data", nargs="+", type=Path, default=[], help="what must be the same for all ranks, by size")
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel size, whose groups are tried too")
    parser.add_argument("--all-reduce-mib", type=float, help="MiB of the timed all_reduce (256 on GPUs, 1 on CPUs)")
    parser.add_argument("--min-bandwidth", type=float, metavar="GB/S", help="bus bandwidth below which it is an error")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = parse(argv)
    config = PreflightConfig(all_reduce_mib=args.all_reduce_mib, min_bandwidth_gbs=args.min_bandwidth)
    config.validate()
    environment = read_environment(os.environ)
    topology, device = Topology(environment.world_size, environment.rank, args.tp), rank_device(environment)
    preflight = Preflight(config, environment.rank, device, None, vars(args), FaultConfig())

    def meet(gather: Gather) -> None:
        preflight.meet(gather)
        if args.output is not None:
            check_folder(args.output, environment.rank, preflight.hosts, gather)

    faulthandler.dump_traceback_later(FaultConfig().hang_seconds, exit=True)  # ranks that wait for each other in vain
    with joined(environment, device, meet):
        preflight.try_collectives(ProcessGroups.build(topology))
        preflight.see(args.data, contents=False)
        if missing := [str(path) for path in args.data if not path.exists()]:
            raise ConfigError(f"--data {', '.join(missing)}: not there on any rank. Check the path.")
    faulthandler.cancel_dump_traceback_later()
    if environment.rank == 0:
        found = [f"  {name}: {value}" for name, value in preflight.found.items()]
        print("\n".join([preflight.line(), *found, *(f"WARNING: {warning}." for warning in preflight.warnings)]))


if __name__ == "__main__":
    sys.exit(cli.run(main))
