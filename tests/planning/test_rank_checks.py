"""What is concluded from the reports of many ranks: versions, cards, networks, links, slow devices."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mm_moslora import cli
from mm_moslora.planning import doctor
from mm_moslora.planning.ranks.link_speed import judge_computing, judge_links, pairs_by_round
from mm_moslora.planning.ranks.rank_facts import RankFacts, differences, network_faults
from mm_moslora.training.supervision.rank_agreement import spans

HOSTS = ["a"] * 4 + ["b"] * 4 + ["c"] * 2


def reports(hosts: list[str], **changes: object) -> list[RankFacts]:
    interfaces = {"lo": ["127.0.0.1"], "eth0": ["10.0.0.1"], "ib0": ["10.1.0.1"]}
    return [
        RankFacts(
            rank=rank, host=host, software={"torch": "2.13.0"}, card="H100", memory_gib=80.0, address="10.0.0.1",
            interfaces=interfaces,
        )
        for rank, host in enumerate(hosts)
    ]  # fmt: skip


def found(facts: list[RankFacts]) -> dict[str, tuple[str, str]]:
    return {item.name: (item.status, item.detail) for item in differences(facts)}


def test_hosts_that_differ_are_named():
    facts = reports(["a", "a", "b"])
    assert all(status == "ok" for status, _ in found(facts).values())
    facts[2] = replace(facts[2], software={"torch": "2.11.0"}, card="A100", memory_gib=40.0, clock=5.0)
    said = found(facts)
    assert said["torch of the ranks"] == ("bad", "2.13.0 on ranks 0-1 (a); 2.11.0 on rank 2 (b)")
    assert said["accelerator"] == ("warn", "different cards: H100 on ranks 0-1 (a); A100 on rank 2 (b)")
    assert said["clocks"] == ("warn", "that of b is +5.0 s from that of a")
    assert said["ranks"] == ("ok", "3: 0-1 on a, 2 on b")
    assert spans([3, 0, 1, 5, 4]) == "0-1, 3-5"


@pytest.mark.parametrize(
    ("variable", "value", "fine"),
    [
        ("GLOO_SOCKET_IFNAME", "eth0", True),
        ("GLOO_SOCKET_IFNAME", "eth", False),
        ("GLOO_SOCKET_IFNAME", "eth1,ib0", True),
        ("NCCL_SOCKET_IFNAME", "eth", True),
        ("NCCL_SOCKET_IFNAME", "=eth", False),
        ("NCCL_SOCKET_IFNAME", "^lo", True),
        ("NCCL_SOCKET_IFNAME", "^lo,eth,ib", False),
        ("NCCL_SOCKET_IFNAME", "ens", False),
        ("GLOO_SOCKET_IFNAME", "lo", False),
    ],
)
def test_a_variable_must_name_an_interface_of_the_host(variable, value, fine):
    facts = reports(["a", "b"])
    facts[1] = replace(facts[1], chosen={variable: value})
    faults = list(network_faults(facts))
    assert not faults if fine else "b has eth0, ib0" in faults[0].detail
    if value == "lo":
        assert not list(network_faults(facts[1:])), "one host alone"


def test_a_host_name_that_leads_back_to_the_host_is_a_fault_where_there_are_others():
    facts = [replace(item, address="127.0.1.1") for item in reports(["a", "b"])]
    assert [item.name for item in network_faults(facts)] == ["name of a", "name of b"]
    assert not list(network_faults(facts[:1]))
    assert not list(network_faults([replace(item, chosen={"GLOO_SOCKET_IFNAME": "eth0"}) for item in facts]))


@pytest.mark.parametrize("hosts", [HOSTS, ["a", "a"], ["a", "b"], ["a", "b", "c"], ["a", "b", "a", "b", "b"]])
def test_rounds_show_single_links(hosts):
    """Each pair within a host once, each two hosts by every place that both have, and no rank twice in a round."""
    rounds = pairs_by_round(hosts)
    pairs = [pair for pairs in rounds for pair in pairs]
    assert len(pairs) == len(set(pairs))
    place = [hosts[:rank].count(host) for rank, host in enumerate(hosts)]
    ranks = range(len(hosts))
    expected = {(a, b) for a in ranks for b in ranks if a < b and (hosts[a] == hosts[b] or place[a] == place[b])}
    assert {tuple(sorted(pair)) for pair in pairs} == expected
    assert all(len({rank for pair in pairs for rank in pair}) == 2 * len(pairs) for pairs in rounds)


def test_a_slow_link_and_a_rank_with_slow_links_are_named():
    facts = reports(HOSTS)
    links = {pair: 200.0 if HOSTS[pair[0]] == HOSTS[pair[1]] else 40.0 for p in pairs_by_round(HOSTS) for pair in p}
    assert [item.status for item in judge_links(links, facts)] == ["ok", "ok"]
    slow = {pair: 3.0 if 5 in pair else speed for pair, speed in links.items()}
    slow[0, 4] = 11.0
    inside, between = judge_links(slow, facts)
    assert inside.status == between.status == "warn"
    assert inside.detail == "all links of rank 5 (b) are slow; the median is 200 GB/s"
    assert "rank 0 (a) and rank 4 (b): 11 GB/s" in between.detail
    poor = {pair: 0.1 for pair in links if HOSTS[pair[0]] != HOSTS[pair[1]]}
    assert "NCCL_IB_HCA" in next(judge_links(poor, facts)).remedy


def test_a_slow_device_is_named():
    facts = reports(["a", "a", "b", "b"])
    assert judge_computing([1.0, 1.1, 1.0, 1.2], facts).status == "ok"
    slow = judge_computing([1.0, 1.1, 1.0, 2.5], facts)
    assert (slow.status, slow.detail[:10]) == ("warn", "rank 3 (b)")
    assert judge_computing([1.0, 2.5], facts[1:3]).detail.startswith("rank 1 (a)")


@pytest.mark.parametrize(
    ("built", "capability", "runs"),
    [
        (["sm_75", "sm_80", "sm_90"], (8, 6), True),
        (["sm_75", "sm_80", "sm_90"], (7, 0), False),
        (["sm_75", "sm_80", "sm_90"], (10, 0), False),
        (["sm_75", "sm_90a", "compute_90"], (10, 0), True),
        (["sm_100", "sm_120"], (12, 0), True),
        ([], (8, 0), True),
    ],
)
def test_a_card_that_torch_has_no_kernels_for_is_told_apart(built, capability, runs):
    assert doctor._runs(built, capability) == runs


def test_one_process_alone_is_told_how_several_are_started(capsys):
    assert cli.run(["doctor", "--distributed"]) == 1
    assert "mm-moslora launch --doctor RECIPE" in capsys.readouterr().err
