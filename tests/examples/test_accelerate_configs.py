"""The ready-made accelerate configurations, read by accelerate itself."""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env

DIRECTORY = Path(__file__).parents[2] / "examples" / "accelerate"
EXPECTED = {
    "single_gpu": (DistributedType.NO, 1, 1),
    "ddp_8gpu": (DistributedType.MULTI_GPU, 8, 1),
    "fsdp2": (DistributedType.FSDP, 8, 1),
    "multi_node": (DistributedType.MULTI_GPU, 16, 2),
}


def test_every_file_is_known():
    assert {file.stem for file in DIRECTORY.iterdir()} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_accelerate_reads_it(name):
    config = load_config_from_file(str(DIRECTORY / f"{name}.yaml"))  # raises for keys it does not know
    assert (config.distributed_type, config.num_processes, config.num_machines) == EXPECTED[name]
    assert config.mixed_precision == "bf16"
    assert not config.use_cpu


@pytest.mark.parametrize("name", EXPECTED)
def test_the_launcher_passes_it_on(name):
    """What `accelerate launch` puts into the environment of the processes."""
    arguments = launch_command_parser().parse_args(["--config_file", str(DIRECTORY / f"{name}.yaml"), "script.py"])
    arguments, _, _ = _validate_launch_command(arguments)
    assert arguments.num_processes == EXPECTED[name][1]
    if EXPECTED[name][0] == DistributedType.NO:
        _, environment = prepare_simple_launcher_cmd_env(arguments)
    else:
        environment = prepare_multi_gpu_env(arguments)
    assert environment["ACCELERATE_MIXED_PRECISION"] == "bf16"
    assert (environment.get("ACCELERATE_USE_FSDP") == "true") == (name == "fsdp2")
    if name == "fsdp2":
        assert environment["FSDP_VERSION"] == "2"
        assert environment["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"
        assert environment["FSDP_STATE_DICT_TYPE"] == "FULL_STATE_DICT"
        assert environment["FSDP_RESHARD_AFTER_FORWARD"] == "true"
