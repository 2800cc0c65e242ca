"""The same experiment, started by ``torchrun`` on two hosts, ends where the in-process run ends."""

import sys
from pathlib import Path

import pytest

import netns
from cli_runner import environment, sterna

RUN = ["run", "digits.terngrad", "--epochs", "2", "--seed", "3"]


@pytest.mark.netns
def test_torchrun_on_two_hosts_equals_in_process(tmp_path: Path) -> None:
    if (reason := netns.available()) is not None:
        pytest.skip(reason)
    ended = sterna(
        *RUN, *("--workers", "4", "--engine", "in-process", "--out", "here"), cwd=tmp_path
    )
    assert ended.status == 0, ended.err
    with netns.shaped_hosts(2, 1000) as hosts:
        processes = []
        for rank, host in enumerate(hosts):
            torchrun = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "2"]
            meeting = ["--node-rank", str(rank), "--master-addr", hosts[0].address]
            command = [*torchrun, *meeting, "--master-port", "29611", "-m", "sterna", *RUN]
            folder = tmp_path / f"host-{rank}"  # the hosts share no folder
            folder.mkdir()
            processes.append(
                host.popen(
                    [sys.executable, *command, "--out", "there"],
                    cwd=folder,
                    env=environment(**host.environment(hosts[0])),
                )
            )
        for process in processes:
            assert process.wait(timeout=120) == 0
    ours = (tmp_path / "here/model.safetensors").read_bytes()
    assert (tmp_path / "host-0/there/model.safetensors").read_bytes() == ours
    assert list((tmp_path / "host-1/there/checkpoint").glob("step-*/rank-3.safetensors"))
    assert not (tmp_path / "host-1/there/summary.json").exists()
