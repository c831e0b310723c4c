"""How the fuzzer damages content: JSON, XML, TOML, safetensors and plain bytes.

A mutator takes a random generator and the content of a file, and returns the damaged content and a
word on what it did. The same generator and content give the same damage.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Any

Mutator = Callable[[Random, bytes], tuple[bytes, str]]

NINES = "9" * 400
ESCAPE = "\x1b]0;owned\x07\x1b[2J\x9b31m"
#: What people, or those who mean harm, put where text is expected.
TEXTS: tuple[str, ...] = (
    "",
    " ",
    ESCAPE,
    "two\nlines\r",
    "\0",
    "\ud800",
    "\u202eabc\u2028",
    "x" * 100_000,
    "x" * 300,
    "../outside/secret.json",
    "../../outside/secret.json",
    "/dev/zero",
    "~nobody/x",
    "%s%n{0}{a!r}",
    "(" * 3000 + ")" * 3000,
    "a{99999999999999999999}",
    "(a+)+$",
    "nan",
    "1e400",
    NINES,
)
_NUMBERS = (
    NINES,
    "-" + NINES,
    "9" * 5000,
    "1e400",
    "-1e400",
    "NaN",
    "Infinity",
    "-1",
    "0",
    "1e-320",
)
#: JSON as it would be written, with what json.dumps does not write.
JSON_LITERALS: tuple[str, ...] = (
    *_NUMBERS,
    *(json.dumps(text) for text in TEXTS),
    *("0.5", "2147483648", "18446744073709551616", "true", "null", "{}", "[]", "[[]]", '["a", 1]'),
    *('{"a": {"b": []}}', "[" * 5000 + "]" * 5000, '{"a":' * 5000 + "1" + "}" * 5000),
    "[" + "0," * 50_000 + "0]",
)
#: Keys that somebody may read, and that the originals do not all have.
_KEYS = """
quality measured median_psnr suggested guidance_scale num_inference_steps scheduler baked passes
target shift_factor scaling_factor latents_mean latents_std
lambda_min_clipped use_beta_sigmas use_karras_sigmas sigma_min timesteps trained_betas beta_end
rescale_betas_zero_snr time_cond_proj_dim addition_embed_type sample_size hidden_act eos_token_id
projection_dim force_upcast requires_aesthetics_score _name_or_path model_max_length pad_token
added_tokens_decoder auto_map weight_map use_rslora alpha_pattern lora_alpha name version
"""
KEYS: tuple[str, ...] = tuple(_KEYS.split())
TOML_LITERALS: tuple[str, ...] = (
    *("9" * 5000, NINES, "-1", "0", "nan", "inf", "1e400", "true", "''", "[]", "{}", "1979-05-27"),
    *("[[1]]", "['a', 1]", "{a = {b = 1}}", "[" * 3000 + "]" * 3000, "'" + "x" * 100_000 + "'"),
    *('"\\u001b[2J"', '"\\u0000"', "['" + "(" * 3000 + ")" * 3000 + "']", "['(a+)+$']", "['*']"),
    *("['a{99999999999999999999}']", "'../outside/secret.txt'", "'/dev/zero'", "'~nobody/x'"),
)
#: Bits of an element, of the types that are stored.
_BITS = {"u1": 1, "u2": 2, "u3": 3, "u4": 4, "i4": 4, "nf4": 4, "f4e2m1": 4, "u6": 6, "i8": 8}
_BITS |= {"f8e4m3": 8, "f8e8m0": 8, "boolean": 8, "bf16": 16, "u16": 16, "f32": 32, "f64": 64}
_TYPES = (
    "u1 u2 u3 u4 i4 nf4 u6 f4e2m1 f8e4m3 f8e5m2 f8e8m0 bf16 f16 f32 f64 i64 string boolean dynamic"
)
_LAYERS = (
    "Const Parameter Result Convert Broadcast Tile Reshape TensorIterator Loop If ReadValue Assign"
    " NonMaxSuppression StringTensorUnpack Gather Concat MatMul Convolution FakeQuantize Nothing"
)
_COUNTS = ("-1", "0", "1", "7", "4294967296", "18446744073709551615", NINES, "0x10", "1e3", "")
_SHAPES = ("", "0", "-1", "?", "1", "1..5", "4, 4", "9223372036854775807", "65536, 65536, 65536")
#: Attribute of OpenVINO's IR -> what it may be changed to; other attributes take `_ANY`.
XML_VALUES: dict[str, Sequence[str]] = {
    "element_type": (*_TYPES.split(), "undefined", ""),
    "destination_type": _TYPES.split(),
    "type": _LAYERS.split(),
    "shape": (*_SHAPES, "1, 4294967296, 4294967296"),
    "offset": _COUNTS,
    "size": _COUNTS,
    "version": ("opset0", "opset8", "opset999", "extension", NINES, "-1"),
    "precision": ("FP16", "FP32", "I64", "U1", "BOOL", "nothing"),
}
_ANY = (
    *_COUNTS,
    *_SHAPES,
    "nan",
    "1e400",
    "a&amp;b",
    "&#27;[2J",
    "&#0;",
    "x" * 100_000,
    "true",
    "<",
)
_LAUGHS = "".join(f'<!ENTITY a{n} "{f"&a{n - 1};" * 10 if n else "ha"}">' for n in range(10))
#: What is put between two tags.
XML_SNIPPETS: tuple[str, ...] = (
    "<!-- a comment -->",
    "<!-- " + "<layer " * 60_000 + "-->",
    "<![CDATA[<layer>]]>",
    "<?php x ?>",
    f"<!DOCTYPE a [{_LAUGHS}]><a>&a9;</a>",
    '<!DOCTYPE a [<!ENTITY x SYSTEM "../outside/secret.json">]><a>&x;</a>',
    '<layer type="Parameter"/>' * 20_000,
    '<layer id="99999" name="x" type="Parameter" version="opset1">',
    "<a>" * 20_000,
    "<a " + "b='1' " * 20_000 + ">",
    "&bogus;",
    "\0",
    "\x1b[2J",
)
_ATTRIBUTE = re.compile(r'([\w:-]+)="([^"]*)"')
_ELEMENT = re.compile(r"<(layer|edge|port|data|input|output)\b(?:[^>]*/>|.*?</\1>)", re.DOTALL)
_CONSTANT = re.compile(r'element_type="(\w+)" shape="([\d, ]*)"( offset="\d+") size="\d+"')
_DIM = re.compile(r"<dim>([^<]*)</dim>")
_TOML_VALUE = re.compile(r"^([ \t]*[\w.'\"-]+[ \t]*=)(.*)$", re.MULTILINE)
_TOML_LINES = (
    ".".join("a" * 20_000) + " = 1",
    "[unet]",
    "[[passes]]",
    "[[passes]]\nkind = ['prune']",
    "[a.b.c]\n" * 2000,
    "nothing = 1",
    "name = '\x1b[2J'",
    'prompts_file = "../outside/secret.txt"',
    "unet.mode = 'int8'",
    "\ufeff",
)
_DTYPES = ("F16", "F32", "BF16", "F64", "F8_E4M3", "U8", "I64", "BOOL", "nothing", "")
_HEADER_SIZES = (0, 1, 2, 2**20, 100 * 2**20, 2**40, 2**63, 2**64 - 1)


def mutate_bytes(rng: Random, content: bytes) -> tuple[bytes, str]:
    """Flip, cut, insert or repeat a few bytes."""
    at = rng.randrange(len(content)) if content else 0
    length = rng.choice((1, 4, 64, 1024))
    how = rng.choice(("flip", "cut", "insert", "repeat"))
    if how == "flip":
        mask = rng.randrange(1, 256)
        part = bytes(byte ^ mask for byte in content[at : at + length])
        return content[:at] + part + content[at + length :], "flip"
    if how == "cut":
        return content[:at] + (b"" if rng.random() < 0.5 else content[at + length :]), "cut"
    if how == "insert":
        return content[:at] + rng.randbytes(length) + content[at:], "insert"
    part = content[at : at + length] * rng.choice((2, 100))
    return content[:at] + part + content[at:], "repeat"


def mutate_json(rng: Random, content: bytes) -> tuple[bytes, str]:
    """Replace, remove, rename, repeat or wrap one value of the tree."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return mutate_bytes(rng, content)
    places = list(_places(value))
    if not places or rng.random() < 0.03:
        literal = rng.choice(JSON_LITERALS)
        return literal.encode(), f"all becomes {literal[:20]}"
    # A kind of value first: else a vocabulary's numbers would be all that is drawn.
    kinds = sorted({type(parent[key]).__name__ for parent, key in places})
    kind = rng.choice(kinds)
    parent, key = rng.choice([at for at in places if type(at[0][at[1]]).__name__ == kind])
    how = rng.choice(("replace",) * 6 + ("remove", "remove", "rename", "repeat", "wrap", "add"))
    literal = _literal(rng, parent[key])
    raw = {}
    if how == "remove":
        del parent[key]
    elif how == "wrap":
        parent[key] = rng.choice(([parent[key]], {"a": parent[key]}))
    elif how == "replace" or isinstance(parent, list):
        parent[key], raw['"@value@"'] = "@value@", literal
    else:
        name = {"rename": json.dumps(rng.choice(TEXTS)), "repeat": json.dumps(key)}.get(
            how, '"new"'
        )
        parent["@name@"] = parent.pop(key) if how == "rename" else "@value@"
        raw = {'"@name@"': name, '"@value@"': literal}
    text = json.dumps(value, indent=1)
    for token, written in raw.items():
        text = text.replace(token, written)
    return text.encode(), f"{how} {str(key)[:40]} {literal[:20] if raw else ''}".strip()


def _literal(rng: Random, value: Any) -> str:
    """Return what to write in the place of ``value``, half of the time of its type."""
    if rng.random() < 0.5 and isinstance(value, (int, float)):
        return rng.choice(_NUMBERS)
    if rng.random() < 0.5 and isinstance(value, str):
        return json.dumps(rng.choice(TEXTS))
    return rng.choice(JSON_LITERALS)


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every (list or object, index or key) of a parsed JSON value."""
    waiting = [value]
    while waiting:
        parent = waiting.pop()
        if not isinstance(parent, (list, dict)):
            continue
        for key in range(len(parent)) if isinstance(parent, list) else list(parent):
            yield parent, key
            waiting.append(parent[key])


def mutate_xml(rng: Random, content: bytes) -> tuple[bytes, str]:
    """Change an attribute or a dimension, drop or repeat an element, or put something between."""
    text = content.decode("utf-8", "surrogateescape")
    how = rng.choice(("attribute",) * 6 + ("dim", "drop", "repeat", "snippet", "snippet", "type"))
    if how == "snippet":
        found = [match.end() for match in re.finditer(">", text)]
        at = found[0] if found and rng.random() < 0.5 else rng.choice(found or [0])
        snippet = rng.choice(XML_SNIPPETS)
        return _encoded(text[:at] + snippet + text[at:]), f"put {snippet[:20]!r}"
    pattern = {"attribute": _ATTRIBUTE, "dim": _DIM, "type": _CONSTANT}.get(how, _ELEMENT)
    matches = list(pattern.finditer(text))
    if not matches:
        return mutate_bytes(rng, content)
    if how == "attribute":
        # Names first: else most draws would fall on the many ids of ports.
        name = rng.choice(sorted({match[1] for match in matches}))
        match = rng.choice([match for match in matches if match[1] == name])
        value = rng.choice(XML_VALUES.get(name, _ANY) if rng.random() < 0.9 else _ANY)
        new = f'{name}="{value}"'
    elif how == "type":  # with the size that is right for it, as checks of sizes would have it
        match = rng.choice(matches)
        kind, bits = rng.choice(sorted(_BITS.items()))
        size = -(-math.prod(map(int, filter(None, match[2].split(", ")))) * bits // 8)
        new = f'element_type="{kind}" shape="{match[2]}"{match[3]} size="{size}"'
    else:
        match = rng.choice(matches)
        dim = rng.choice(("-1", "0", "65536", "9223372036854775807", NINES, "x", ""))
        new = {"dim": f"<dim>{dim}</dim>", "drop": ""}.get(how, match[0] * 2)
    return _encoded(text[: match.start()] + new + text[match.end() :]), f"{how} {new[:40]!r}"


def mutate_toml(rng: Random, content: bytes) -> tuple[bytes, str]:
    """Change a value, or drop, repeat or add a line."""
    text = content.decode("utf-8", "surrogateescape")
    how = rng.choice(("value",) * 5 + ("drop", "repeat", "add", "add"))
    values = list(_TOML_VALUE.finditer(text))
    if how == "value" and values:
        match = rng.choice(values)
        literal = rng.choice(TOML_LITERALS)
        new = f"{match[1]} {literal}"
        return _encoded(text[: match.start()] + new + text[match.end() :]), new[:50]
    lines = text.splitlines()
    at = rng.randrange(len(lines) + 1)
    if how == "drop":
        del lines[at : at + 1]
    elif how == "repeat":
        lines[at:at] = lines[max(0, at - 1) : at]
    else:
        lines.insert(at, rng.choice(_TOML_LINES))
    return _encoded("\n".join(lines)), f"{how} line {at}"


def mutate_safetensors(rng: Random, content: bytes) -> tuple[bytes, str]:
    """Lie in the header about a tensor, about itself, or damage what follows."""
    length = struct.unpack("<Q", content[:8])[0] if len(content) >= 8 else 0
    header, body = content[8 : 8 + length], content[8 + length :]
    how = rng.choice(("header",) * 4 + ("tensor",) * 4 + ("length", "body", "metadata"))
    if how == "length":
        size = rng.choice((*_HEADER_SIZES, length + 1, length - 1))
        return struct.pack("<Q", size % 2**64) + header + body, f"header of {size}"
    if how == "body":
        body, what = rng.choice((mutate_bytes, _not_finite))(rng, body)
        return content[: 8 + length] + body, f"body {what}"
    if how == "header":
        new, what = mutate_json(rng, header)
        return struct.pack("<Q", len(new)) + new + body, f"header {what}"
    try:
        table = json.loads(header)
        name = rng.choice(sorted(key for key in table if key != "__metadata__"))
        entry = table[name]
        raw = "0"
        if how == "metadata":
            key = rng.choice(("lora_adapter_metadata", "modelspec.title", "ss_output_name", "x"))
            table["__metadata__"] = {key: rng.choice((*TEXTS, *JSON_LITERALS))}
        else:
            what = _lie(rng, entry)
            raw = rng.choice(JSON_LITERALS)
        new = json.dumps(table).replace('"@value@"', raw).encode()
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):  # damaged before
        return mutate_bytes(rng, content)
    return struct.pack("<Q", len(new)) + new + body, f"{how} {name[:60]}"


def _lie(rng: Random, entry: dict[str, Any]) -> str:
    """Change one thing that a header says of a tensor."""
    key = rng.choice(("dtype", "shape", "data_offsets"))
    if key == "dtype":
        entry[key] = rng.choice((*_DTYPES, ["F16"], {"F16": 1}, "@value@"))
    else:
        numbers = entry[key] if isinstance(entry[key], list) and entry[key] else [0]
        at = rng.randrange(len(numbers))
        numbers[at] = rng.choice((-1, 0, 1, 2**31, 2**48, 2**63, 2**64, 1.5, True, [1], "@value@"))
        entry[key] = rng.choice((numbers, numbers, numbers[::-1], numbers * 5, numbers[:1], []))
    return key


def _not_finite(rng: Random, body: bytes) -> tuple[bytes, str]:
    """Put half precision's infinity, or numbers that are none, into the weights."""
    at = rng.randrange(max(1, len(body))) & ~1
    return body[:at] + rng.choice((b"\x00\x7c", b"\x01\x7e")) + body[at + 2 :], "not finite"


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


#: Ending of a file -> the mutators that know its form.
BY_ENDING: dict[str, Mutator] = {
    ".json": mutate_json,
    ".xml": mutate_xml,
    ".toml": mutate_toml,
    ".safetensors": mutate_safetensors,
}


def mutate(rng: Random, content: bytes, ending: str) -> tuple[bytes, str]:
    """Damage the content of a file whose name has this ending, mostly by its form."""
    form = BY_ENDING.get(ending, mutate_bytes)
    return (form if rng.random() < 0.8 else mutate_bytes)(rng, content)
