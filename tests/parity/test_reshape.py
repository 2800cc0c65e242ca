"""The links of the namespaces can change their rate while hosts live behind them."""

import subprocess

import pytest

import netns


def _rates(host: netns.Host) -> list[str]:
    switch = f"{host.namespace.rpartition('-')[0]}-switch"
    said = [
        subprocess.run(
            ["tc", "-n", namespace, "qdisc", "show", "dev", device],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.split()
        for namespace, device in ((host.namespace, host.interface), (switch, "port0"))
    ]
    return [words[words.index("rate") + 1] for words in said]


@pytest.mark.netns
def test_both_ends_of_a_link_get_the_new_rate() -> None:
    if (reason := netns.available()) is not None:
        pytest.skip(reason)
    with netns.shaped_hosts(1, mbit=1000) as hosts:
        assert _rates(hosts[0]) == ["1Gbit", "1Gbit"]
        netns.reshape(hosts, 10)
        assert _rates(hosts[0]) == ["10Mbit", "10Mbit"]
        with pytest.raises(RuntimeError, match="tc"):
            netns.reshape(hosts, 0)
