"""Chips and modules of the Jetson family, as a running Linux names them."""

from __future__ import annotations

CHIPS = {
    "tegra234": ("Orin", (8, 7)),
    "tegra264": ("Thor", (11, 0)),
    "tegra194": ("Xavier", (7, 2)),
    "tegra186": ("TX2", (6, 2)),
    "tegra210": ("Nano, TX1", (5, 3)),
}
"""Last word of the device tree's `compatible` -> name and compute capability (NVIDIA's CUDA GPU list)."""

SUPPORTED = ("tegra234", "tegra264")
"""Chips that have a JetPack with a TensorRT version that fastvlm-edge supports."""

SOC_IDS = {"tegra194": "25", "tegra234": "35", "tegra264": "38"}
"""Chip -> text of /sys/devices/soc0/soc_id: the chip ids 0x19, 0x23 and 0x26 in decimal (Linux, drivers/soc/tegra/fuse)."""

MODULES = {
    "p3767-0000": "Orin NX 16 GB",
    "p3767-0001": "Orin NX 8 GB",
    "p3767-0003": "Orin Nano 8 GB",
    "p3767-0004": "Orin Nano 4 GB",
    "p3767-0005": "Orin Nano 8 GB (developer kit)",
    "p3701-0000": "AGX Orin (developer kit)",
    "p3701-0004": "AGX Orin 32 GB",
    "p3701-0005": "AGX Orin 64 GB",
    "p3701-0008": "AGX Orin Industrial",
    "p3834-0000": "Thor T4000",
    "p3834-0008": "Thor T5000",
}
"""Part number of the module in `compatible` -> its name (Jetson Linux Developer Guide, "Quick Start", table of configurations)."""
