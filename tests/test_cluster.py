"""The files for clusters say what Accelerate and Slurm understand."""

import re
import subprocess
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType
from transformers.models.qwen2 import modeling_qwen2

CLUSTER = Path(__file__).parents[1] / "book" / "cluster"
DDP, FSDP, SLURM = (CLUSTER / name for name in ("ddp.yaml", "fsdp.yaml", "slurm.sh"))


def options():
    """The options of ``accelerate launch``, as its configuration names them."""
    return {
        option
        for action in launch_command_parser()._actions
        for option in action.option_strings
    }


def unknown_options(config):
    """Keys of an FSDP section that no option of ``accelerate launch`` stands behind.

    Accelerate itself takes any key there and passes over what it does not know.
    """
    return sorted(key for key in config.fsdp_config if f"--{key}" not in options())


def test_ddp_is_eight_processes_on_one_machine():
    config = ClusterConfig.from_yaml_file(DDP)
    assert config.distributed_type is DistributedType.MULTI_GPU
    assert (config.num_processes, config.num_machines) == (8, 1)
    assert config.mixed_precision == "bf16"


def test_fsdp_spreads_everything_over_sixty_four():
    config = ClusterConfig.from_yaml_file(FSDP)
    assert config.distributed_type is DistributedType.FSDP
    assert (config.num_processes, config.num_machines) == (64, 8)
    assert config.fsdp_config["fsdp_version"] == 2
    assert config.fsdp_config["fsdp_reshard_after_forward"] is True
    assert unknown_options(config) == []
    block = config.fsdp_config["fsdp_transformer_layer_cls_to_wrap"]
    assert hasattr(modeling_qwen2, block)


@pytest.mark.parametrize(
    ("line", "error"),
    [("num_proceses: 8", "unknown keys"), ("distributed_type: SHARDED", "SHARDED")],
)
def test_a_key_or_kind_that_does_not_exist_is_noticed(tmp_path, line, error):
    text = re.sub(f"(?m)^{line.split(':')[0]}:.*$", "", DDP.read_text())
    path = tmp_path / "broken.yaml"
    path.write_text(f"{text}\n{line}\n")
    with pytest.raises(ValueError, match=error):
        ClusterConfig.from_yaml_file(path)


def test_an_fsdp_key_that_accelerate_would_pass_over_is_noticed(tmp_path):
    path = tmp_path / "broken.yaml"
    path.write_text(FSDP.read_text().replace("fsdp_offload_params", "fsdp_offload"))
    config = ClusterConfig.from_yaml_file(path)
    assert unknown_options(config) == ["fsdp_offload"]


def slurm_options(text):
    """The options that a script gives ``accelerate launch``."""
    return set(re.findall(r"^ +(--\w+) ", text, flags=re.MULTILINE))


def test_slurm_starts_accelerate_with_options_that_it_has():
    text = SLURM.read_text()
    subprocess.run(["bash", "-n", SLURM], check=True)
    given = slurm_options(text)
    assert {"--config_file", "--machine_rank", "--main_process_ip"} <= given
    assert given <= options()
    assert not slurm_options(text.replace("--machine_rank", "--rank")) <= options()
    assert "book/cluster/fsdp.yaml" in text
