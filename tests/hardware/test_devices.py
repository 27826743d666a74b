"""The catalogue of devices and prices: facts as published, and sentences for what is not in it."""

from pathlib import Path

import pytest

from llmtool.errors import UsageError
from llmtool.hardware import Cluster, find_device, load_devices
from llmtool.hardware.prices import need_price, price_of
from llmtool.sim.ops import load_pack


def test_peaks_are_dense() -> None:
    # Data sheets print the sparse figures, twice as high, in larger type.
    h100 = find_device("h100")
    assert h100.peak("bf16") == 989e12 and h100.peak("fp8") == h100.peak("fp8_block") == 1978e12
    assert find_device("a100").peak("fp8") == find_device("a100").peak("bf16") == 312e12


@pytest.mark.parametrize("name", ["H100", "h100_sxm", "h100-sxm", "RTXPRO6000"])
def test_names_and_aliases(name: str) -> None:
    assert find_device(name).name in ("h100", "rtx-pro-6000")


def test_every_device_is_complete_and_has_its_pack() -> None:
    for device in load_devices().values():
        assert device.source and device.memory > 0 and device.bandwidth > device.network
        if device.efficiency:
            pack = load_pack(device)
            assert pack is not None and "gemm/bf16" in pack.grids
            assert device.measured == (pack.device == device.name)


def test_an_unknown_device_lists_the_known_ones_and_how_to_add_it() -> None:
    with pytest.raises(UsageError, match=r"'tpu' is unknown; known are h100, .*") as e:
        find_device("tpu")
    assert "--devices FILE" in e.value.remedy


def test_a_file_adds_a_device(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("[mine]\nflops = {bf16 = 1e12}\nmemory = 1000\nbandwidth = 1e9\nlink = 1e9\npower = 10\n")
    assert find_device("mine", file).flops == {"bf16": 1e12}
    file.write_text("[mine]\nflops = {bf16 = 1e12}\n")
    with pytest.raises(UsageError, match="lacks memory, bandwidth, link, power"):
        load_devices(file)
    file.write_text("[mine]\nflops = {bf16 = 1e12}\nmemory = -5\nbandwidth = 1e9\nlink = 1e9\npower = 10\n")
    with pytest.raises(UsageError, match="positive"):
        load_devices(file)
    file.write_text("[mine")
    with pytest.raises(UsageError, match="not valid TOML"):
        load_devices(file)


def test_groups_within_and_across_nodes() -> None:
    cluster = Cluster(find_device("h100"), 16)
    assert cluster.num_nodes == 2
    assert not cluster.spans_nodes(8) and cluster.spans_nodes(16) and cluster.spans_nodes(2, stride=8)
    assert cluster.link(8) == 450e9 and cluster.link(2, stride=8) == 50e9
    with pytest.raises(UsageError, match="no whole number of nodes"):
        Cluster(find_device("h100"), 12)


def test_prices_are_dated_and_never_invented(tmp_path: Path) -> None:
    price = price_of("h100")
    assert price is not None and price.usd_per_hour == 1.99 and price.note.startswith("2026")
    assert price_of("l4") is None
    with pytest.raises(UsageError, match="price of l4 is not known"):
        need_price("l4")
    given = price_of("l4", 0.5)
    assert given is not None and given.usd_per_hour == 0.5
    table = tmp_path / "prices.toml"
    table.write_text('date = "2027-01"\n[usd_per_hour]\nl4 = [0.4, 0.6]\n')
    assert need_price("l4", path=table).usd_per_hour == 0.4
    table.write_text("[usd_per_hour]\nl4 = 0.4\n")
    with pytest.raises(UsageError, match="needs `date`"):
        price_of("l4", path=table)
