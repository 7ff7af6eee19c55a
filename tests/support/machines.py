"""Folders that look like the root of real devices: what their /proc and /etc hold, as bug reports show it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

A72 = "fp asimd evtstrm crc32 cpuid"
A76 = "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp"
A78AE = A76 + " uscat ilrcpc flagm paca pacg"
V3AE = A78AE + " sve sve2 i8mm bf16 dgh rng bti"
ORYON = (
    A76 + " jscvt fcma sha3 sm3 sm4 sha512 asimdfhm uscat ilrcpc flagm ssbs sb paca pacg frint i8mm bf16 rng"
)
FIRESTORM = A76 + " jscvt fcma sha3 sha512 asimdfhm dit uscat ilrcpc flagm ssbs sb paca pacg frint"
SKYLAKE = "fpu vme de pse tsc msr pae mce cx8 sse sse2 ssse3 fma sse4_1 sse4_2 avx f16c avx2 avx512f"
R36 = "# R36 (release), REVISION: 4.4, GCID: 41062509, BOARD: generic, EABI: aarch64, DATE: Mon Jun 16 2025\n"
R38 = "# R38 (release), REVISION: 2.0, GCID: 41844464, BOARD: generic, EABI: aarch64, DATE: Fri Aug 22 2025\n"


@dataclass(frozen=True)
class Board:
    """What one machine shows of itself."""

    memory_kb: int
    cores: int
    cpu: str  # "implementer:part" on ARM, the model name on x86
    features: str
    model: str = ""  # device tree
    compatible: tuple[str, ...] = ()
    tegra_release: str = ""
    cpuinfo_model: str = ""  # the "Model" line that Raspberry Pi's kernel adds

    @property
    def machine(self) -> str:
        return "aarch64" if self.cpu.startswith("0x") else "x86_64"


def write_root(root: Path, board: Board) -> Path:
    """Write the files of `board` under `root`, device-tree strings with their NUL."""
    (root / "proc/device-tree").mkdir(parents=True)
    (root / "etc").mkdir()
    if board.model:
        (root / "proc/device-tree/model").write_bytes(board.model.encode() + b"\0")
    if board.compatible:
        words = b"".join(word.encode() + b"\0" for word in board.compatible)
        (root / "proc/device-tree/compatible").write_bytes(words)
    if board.tegra_release:
        (root / "etc/nv_tegra_release").write_text(board.tegra_release)
    (root / "proc/meminfo").write_text(
        f"MemTotal:       {board.memory_kb} kB\nMemFree:         {board.memory_kb // 2} kB\nSwapTotal: 0 kB\n"
    )
    (root / "proc/cpuinfo").write_text(_cpuinfo(board))
    return root


def _cpuinfo(board: Board) -> str:
    if board.machine == "x86_64":
        core = "vendor_id\t: GenuineIntel\nmodel\t\t: 85\nmodel name\t: {cpu}\nflags\t\t: {features}\n"
    else:
        core = (
            "BogoMIPS\t: 108.00\nFeatures\t: {features}\nCPU implementer\t: {implementer}\n"
            "CPU architecture: 8\nCPU variant\t: 0x4\nCPU part\t: {part}\nCPU revision\t: 1\n"
        )
    implementer, _, part = board.cpu.partition(":")
    cores = [
        f"processor\t: {i}\n"
        + core.format(cpu=board.cpu, features=board.features, implementer=implementer, part=part)
        for i in range(board.cores)
    ]
    tail = f"Revision\t: d04170\nModel\t\t: {board.cpuinfo_model}\n" if board.cpuinfo_model else ""
    return "\n".join(cores) + "\n" + tail


def _pi(generation: int, memory_kb: int, revision: str) -> Board:
    model = f"Raspberry Pi {generation} Model B Rev {revision}"
    part, features = ("0xd08", A72) if generation == 4 else ("0xd0b", A76)
    return Board(
        memory_kb,
        4,
        f"0x41:{part}",
        features,
        model,
        (f"raspberrypi,{generation}-model-b", f"brcm,bcm271{generation - 3}"),
        cpuinfo_model=model,
    )


def _jetson(memory_kb: int, cores: int, model: str, compatible: tuple[str, ...], release: str = R38) -> Board:
    thor = "tegra264" in compatible[-1]
    return Board(
        memory_kb,
        cores,
        "0x41:0xd83" if thor else "0x41:0xd42",
        V3AE if thor else A78AE,
        model,
        compatible,
        release,
    )


# profile name -> machines that must be detected as that profile
BOARDS: dict[str, list[Board]] = {
    "raspberry-pi-4-4gb": [
        _pi(4, 3885396, "1.4"),
        Board(3885396, 4, "0x41:0xd08", A72, "Raspberry Pi 400 Rev 1.0", ("raspberrypi,400", "brcm,bcm2711")),
    ],
    "raspberry-pi-4-8gb": [
        _pi(4, 7999784, "1.5"),
        Board(
            7999784,
            4,
            "0x41:0xd08",
            A72,
            "Raspberry Pi Compute Module 4 Rev 1.1",
            ("raspberrypi,4-compute-module", "brcm,bcm2711"),
        ),
    ],
    "raspberry-pi-5-4gb": [_pi(5, 4147552, "1.0")],
    "raspberry-pi-5-8gb": [
        _pi(5, 8256272, "1.0"),
        Board(
            8256272, 4, "0x41:0xd0b", A76, cpuinfo_model="Raspberry Pi 5 Model B Rev 1.0"
        ),  # in a container
        Board(8256272, 4, "0x41:0xd0b", A76, "Raspberry Pi 500 Rev 1.0", ("raspberrypi,500", "brcm,bcm2712")),
    ],
    "raspberry-pi-5-16gb": [
        _pi(5, 16608032, "1.1"),
        Board(
            16608032,
            4,
            "0x41:0xd0b",
            A76,
            "Raspberry Pi Compute Module 5 Rev 1.0",
            ("raspberrypi,5-compute-module", "brcm,bcm2712"),
        ),
    ],
    "jetson-orin-nano-8gb": [
        _jetson(
            7802900,
            6,
            "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super",
            ("nvidia,p3768-0000+p3767-0005-super", "nvidia,p3767-0005", "nvidia,tegra234"),
        ),
        _jetson(
            6600000,  # with the first firmware
            6,
            "NVIDIA Orin Nano Developer Kit",
            (
                "nvidia,p3768-0000+p3767-0003",
                "nvidia,p3768-0000+p3767-0005",
                "nvidia,p3767-0003",
                "nvidia,p3767-0005",
                "nvidia,tegra234",
            ),
            R36,
        ),
        Board(7802900, 6, "0x41:0xd42", A78AE, tegra_release=R38),  # in a container
    ],
    "jetson-orin-nx-16gb": [
        _jetson(
            16031334,
            8,
            "NVIDIA Jetson Orin NX Engineering Reference Developer Kit",
            ("nvidia,p3768-0000+p3767-0000", "nvidia,p3767-0000", "nvidia,tegra234"),
        ),
        _jetson(
            16031334,
            8,
            "Vendor's Carrier Board",
            ("vendor,board+p3767-0000", "nvidia,p3767-0000", "nvidia,tegra234"),
        ),
        Board(16031334, 8, "0x41:0xd42", A78AE, tegra_release=R38),
    ],
    "jetson-agx-orin-64gb": [
        _jetson(
            64349184,
            12,
            "NVIDIA Jetson AGX Orin Developer Kit",
            ("nvidia,p3737-0000+p3701-0005", "nvidia,p3701-0005", "nvidia,tegra234"),
        ),
        Board(64349184, 12, "0x41:0xd42", A78AE, tegra_release=R38),
    ],
    "jetson-thor": [
        _jetson(
            128790528,
            14,
            "NVIDIA Jetson AGX Thor Developer Kit",
            ("nvidia,p4071-0000+p3834-0008", "nvidia,p3834-0008", "nvidia,tegra264"),
        ),
        _jetson(  # factory firmware
            128790528,
            14,
            "NVIDIA Jetson Thor Developer Kit",
            ("nvidia,p4071-0080+p3834-0008", "nvidia,p3834-0008", "nvidia,tegra264"),
        ),
        Board(128790528, 14, "0x41:0xd83", V3AE, tegra_release=R38),
    ],
    "arm-laptop-16gb": [
        Board(
            15976000,
            12,
            "0x51:0x001",
            ORYON,
            "Lenovo Yoga Slim 7x",
            ("lenovo,yoga-slim7x", "qcom,x1e80100"),
        ),
        Board(
            15976000,
            8,
            "0x51:0x001",
            ORYON,
            "Asus Zenbook A14 (UX3407QA)",
            ("asus,zenbook-a14-ux3407qa-lcd", "qcom,x1p42100"),
        ),
        Board(16000000, 8, "0x51:0x001", ORYON),  # WSL 2: no device tree
    ],
    "apple-silicon-16gb": [
        Board(
            15900000,
            8,
            "0x61:0x022",
            FIRESTORM,
            "Apple MacBook Air (M1, 2020)",
            ("apple,j313", "apple,t8103", "apple,arm-platform"),
        ),
    ],
    "x86-64-generic": [
        Board(16200000, 8, "Intel(R) Core(TM) i5-8250U CPU @ 1.60GHz", SKYLAKE),
        Board(2000000, 1, "Intel(R) Celeron(R) J4125 CPU @ 2.00GHz", "fpu sse sse2 ssse3 sse4_1 sse4_2"),
    ],
}
