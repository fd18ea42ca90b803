"""Cards by name, and sizes as people write them."""

import re
from difflib import get_close_matches

MIB, GIB = 2**20, 2**30
RESERVED = (
    768 * MIB
)  # of a card's memory: the driver's context, the libraries' work space, the allocator's rounding (not measured here)

CARDS: dict[str, int] = {  # name -> MiB, as the driver reports them; the makers' round figures where that is not known
    "A10": 23028, "A100-40": 40960, "A100-80": 81920, "A30": 24576, "A40": 46068, "A5000": 24564, "A6000": 49140,
    "B200": 183359, "GH200": 97871, "H100": 81559, "H100-80": 81559, "H100-NVL": 95830, "H200": 143771, "L4": 23034, "L40": 46068, "L40S": 46068,
    "MI210": 65520, "MI250X": 65520, "MI300X": 196592, "P100": 16384, "RTX 2080 Ti": 11264, "RTX 3060": 12288, "RTX 3060 Ti": 8192,
    "RTX 3070": 8192, "RTX 3080": 10240, "RTX 3080 Ti": 12288, "RTX 3090": 24576, "RTX 3090 Ti": 24564, "RTX 4060": 8188,
    "RTX 4060 Ti": 16380, "RTX 4070": 12282, "RTX 4070 Ti": 12282, "RTX 4080": 16376, "RTX 4090": 24564, "RTX 5060": 8151,
    "RTX 5060 Ti": 16311, "RTX 5070": 12227, "RTX 5070 Ti": 16303, "RTX 5080": 16303, "RTX 5090": 32607, "RTX 6000 Ada": 49140,
    "RTX PRO 6000": 97887, "T4": 15360, "V100-16": 16384, "V100-32": 32768,
}  # fmt: skip
UNITS = {"": 1, "b": 1, "k": 10**3, "kb": 10**3, "kib": 2**10, "m": 10**6, "mb": 10**6, "mib": 2**20, "g": 10**9, "gb": 10**9,
         "gib": 2**30, "t": 10**12, "tb": 10**12, "tib": 2**40}  # fmt: skip


def budget(given: str | int) -> int:
    """Usable bytes of a card ("RTX 4090", "a100-80"), or of a size ("24GB" is 24e9 bytes, "24GiB" 24 * 2**30).

    Raises ValueError with the nearest names; TypeError for another kind.
    """
    if isinstance(given, bool) or not isinstance(given, str | int):
        raise TypeError(
            f"the budget is {given!r}; it must be a card's name, a size such as '24GB', or a number of bytes"
        )
    if isinstance(given, int):
        return _positive(given, given)
    if _plain(given) in map(_plain, CARDS):
        return usable(given)
    size = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*", given)
    if size and size[2].lower() in UNITS:
        return _positive(int(float(size[1]) * UNITS[size[2].lower()]), given)
    return usable(given)


def usable(name: str) -> int:
    """Bytes of a card that a run may take. Raises ValueError with the nearest names."""
    known = {_plain(card): card for card in CARDS}
    wanted = _plain(name)
    if wanted not in known:
        near = [known[each] for each in get_close_matches(wanted, known, n=3, cutoff=0.0)]
        raise ValueError(
            f"card '{name}' is not known; nearest names: {', '.join(near)}; or give a size, such as 24GB (all: {', '.join(CARDS)})"
        )
    return CARDS[known[wanted]] * MIB - RESERVED


def _plain(name: str) -> str:
    """A name without what people write in different ways: nvidia, geforce, rtx, gb, spaces and dashes."""
    text = re.sub(r"nvidia|geforce|tesla|quadro|instinct|amd|rtx|gib|gb|sxm\d?|pcie", "", name.lower())
    return re.sub(r"[\s_-]", "", text)


def _positive(bytes: int, given: object) -> int:
    if bytes < 1:
        raise ValueError(f"the budget is {given!r}; it must be more than 0 bytes, for example 24GB")
    return bytes


def shown(bytes: float) -> str:
    """A size for people: 539 MiB, 12.4 GiB."""
    if bytes < 10 * MIB:
        return f"{bytes / 2**10:,.0f} KiB" if bytes < MIB else f"{bytes / MIB:.1f} MiB"
    return f"{bytes / MIB:,.0f} MiB" if bytes < 10 * GIB else f"{bytes / GIB:,.1f} GiB"
