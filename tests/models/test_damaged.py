"""Whatever damage a checkpoint's files have: one message that names a file, or a sound model.

Three files are spoiled in every way that hypothesis thinks of: config.json, the index of a
checkpoint of several files, and the header of a safetensors file.
"""

import copy
import json
import math
import struct

import hypothesis
import numpy as np
import pytest
import transformers
from hypothesis import strategies as st

import models
from models import checkpoint, families, hf_config
from models.checkpoint import INDEX, SINGLE_FILE, CheckpointError, Source
from models.config import DTYPES
from tests import tiny

SHAPE = {
    "num_layers": 1,
    "hidden_size": 16,
    "intermediate_size": 4,
    "vocab_size": 7,
    "num_heads": 2,
    "head_dim": 8,
    "num_kv_heads": 2,
}
CONFIGS = {
    family: hf_config.to_hf(tiny.config(family, **SHAPE)).to_dict() for family in tiny.FAMILIES
}
READ = {name for family in families.FAMILIES.values() for name in family.fields.values()}
NAMES = sorted(
    {name for config in CONFIGS.values() for name in config}
    | READ
    | hf_config.HARMLESS
    | hf_config.UNSUPPORTED.keys()
    | hf_config.ONLY_AT.keys()
    | {"layer_types", "sliding_window", "rope_scaling", "rope_theta", "torch_dtype", "rotary_pct"}
    | {"quantization_config", "to_dict", "__class__", "self", "num_labels", "per_layer_config"}
)
ROTARY_NAMES = sorted(
    {name for kind in hf_config.ROTARY_KINDS.values() for name in kind.values()}
    | {"rope_type", "type", "attention_factor", "partial_rotary_factor", "full_attention"}
)
# What breaks programs most often, and anything that JSON may hold.
SCALARS = st.one_of(
    st.sampled_from([None, True, False, 0, 1, -1, 7, 2**31, 2**63, 10**400, "", "x", "1", "silu"]),
    st.sampled_from([0.0, -0.5, 8.5, 1e308, math.inf, -math.inf, math.nan, "llama", "linear"]),
    st.integers(),
    st.floats(),
    st.text(max_size=4),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=3) | st.sampled_from(ROTARY_NAMES), inner, max_size=3)
    ),
    max_leaves=4,
)
REMOVED = object()


def fuzz(examples):
    """Settings of a test of so many examples."""
    return hypothesis.settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )


@pytest.fixture(scope="module", autouse=True)
def quiet():
    """transformers warns of every other config."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(before)


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """A checkpoint of one file, that of the family is llama."""
    folder = tmp_path_factory.mktemp("single") / "model"
    tiny.save(folder, **SHAPE)
    return folder


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """The same in several files."""
    folder = tmp_path_factory.mktemp("sharded") / "model"
    checkpoint.save(tiny.decoder(**SHAPE), folder, max_shard_bytes=500)
    return folder


def accepted(function, folder):
    """What a function makes of a checkpoint; None where it refuses it, and names a file of it."""
    message = ""
    try:
        return function(folder)
    except CheckpointError as error:
        message = str(error)
    assert str(folder) in message
    return None


def headers(folder):
    """All that is looked at before the shapes are compared with the config's."""
    family = families.get(checkpoint.read_config(folder).family)
    return checkpoint._headers(folder, family)


@st.composite
def damaged_text(draw, text: str):
    """JSON that was cut, or in which some characters are others."""
    start = draw(st.integers(0, len(text)))
    stop = draw(st.integers(start, min(len(text), start + 9)))
    put = draw(st.sampled_from(["", "\0", "{", "[", "]", "}", '"', ",", "9", "-", "\\", "é", "e9"]))
    return text[:start] + put + (text[stop:] if draw(st.booleans()) else "")


@st.composite
def config_texts(draw):
    attributes = copy.deepcopy(CONFIGS[draw(st.sampled_from(tiny.FAMILIES))])
    for _ in range(draw(st.integers(0, 3))):
        name, value = draw(st.sampled_from(NAMES)), draw(VALUES | st.just(REMOVED))
        within = attributes.get("rope_parameters")
        if isinstance(within, dict) and draw(st.booleans()):
            attributes["rope_parameters"] = within | {draw(st.sampled_from(ROTARY_NAMES)): value}
        else:
            attributes[name] = value
    kept = drop_removed(attributes)
    text = json.dumps(kept)
    return draw(damaged_text(text)) if draw(st.integers(0, 3)) == 0 else text


def drop_removed(value):
    if isinstance(value, dict):
        return {key: drop_removed(one) for key, one in value.items() if one is not REMOVED}
    return value


@fuzz(800)
@hypothesis.given(text=config_texts())
def test_config(single, text):
    before = (single / "config.json").read_bytes()
    try:
        (single / "config.json").write_text(text, encoding="utf-8", errors="surrogatepass")
        if accepted(headers, single):
            check_is_sound(json.loads(text))
    finally:
        (single / "config.json").write_bytes(before)


def check_is_sound(attributes):
    """What was accepted is hashable, of plain numbers, and what a checkpoint can be made of."""
    config = hf_config.read(attributes)
    assert hash(config) == hash(hf_config.read(attributes))
    assert config.dtype in DTYPES
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads"):
        assert type(getattr(config, name)) is int and getattr(config, name) > 0
    for name in ("num_kv_heads", "head_dim", "max_positions"):
        assert type(getattr(config, name)) is int and getattr(config, name) > 0
    for name in ("tie_embeddings", "qkv_bias", "output_bias", "mlp_bias", "parallel"):
        assert type(getattr(config, name)) is bool
    for name in ("norm_eps", "query_scalar", "score_cap", "logit_cap"):
        number = getattr(config, name)
        assert number is None or (0 < number < math.inf and not isinstance(number, bool))
    for rotary in filter(None, (config.rotary, config.window_rotary)):
        assert 0 < rotary.theta < math.inf
        assert all(0 < factor < math.inf for factor in rotary.short_factors)
    assert len(config.windows) == config.num_layers


@st.composite
def index_texts(draw, index: dict):
    index = copy.deepcopy(index)
    weight_map = index["weight_map"]
    names, files = sorted(weight_map), sorted(set(weight_map.values()))
    for _ in range(draw(st.integers(0, 3))):
        name = draw(st.sampled_from(names) | st.text(max_size=5))
        file = draw(
            st.sampled_from([*files, SINGLE_FILE, "config.json", "..", ".", "", "/", "a\0b", "x/y"])
            | VALUES
            | st.just(REMOVED)
        )
        index["weight_map"][name] = file
    if draw(st.integers(0, 9)) == 0:
        index["weight_map"] = draw(VALUES)
    text = json.dumps(drop_removed(index))
    return draw(damaged_text(text)) if draw(st.integers(0, 3)) == 0 else text


@fuzz(600)
@hypothesis.given(data=st.data())
def test_index(sharded, data):
    file = sharded / INDEX
    before = file.read_bytes()
    text = data.draw(index_texts(json.loads(before)))
    try:
        file.write_text(text, encoding="utf-8", errors="surrogatepass")
        accepted(checkpoint.weights_hash, sharded)
        # Dearer, so for one in sixteen.
        if data.draw(st.integers(0, 15)) == 0 and (source := accepted(Source.examine, sharded)):
            assert {row.name for row in source.rows} == set(json.loads(before)["weight_map"])
    finally:
        file.write_bytes(before)


@st.composite
def safetensors_bytes(draw, content: bytes):
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    for _ in range(draw(st.integers(0, 2))):
        name = draw(st.sampled_from(sorted(header)) | st.text(max_size=5))
        if draw(st.booleans()) and isinstance(header.get(name), dict):
            part = draw(st.sampled_from(["dtype", "shape", "data_offsets", "other"]))
            types = st.sampled_from(["F16", "BF16", "F64", "I8", "F8_E4M3", "BOOL", "U64", "C64"])
            value = draw(types | st.lists(st.integers(-2, 9), max_size=3) | VALUES)
            header[name] = header[name] | {part: value}
        else:
            header[name] = draw(VALUES | st.just(REMOVED))
    encoded = json.dumps(drop_removed(header)).encode("utf-8", "surrogatepass")
    length = draw(
        st.just(len(encoded))
        | st.integers(0, 2 * len(encoded))
        | st.sampled_from([2**63, 2**64 - 1])
    )
    whole = struct.pack("<Q", length) + encoded + data
    if draw(st.integers(0, 3)) == 0:
        return whole[: draw(st.integers(0, len(whole)))]
    return whole


@fuzz(600)
@hypothesis.given(data=st.data())
def test_header(single, data):
    file = single / SINGLE_FILE
    before = file.read_bytes()
    content = data.draw(safetensors_bytes(before))
    try:
        file.write_bytes(content)
        whole = accepted(headers, single)
        # Dearer, so for one in sixteen of those that are left.
        if (
            whole
            and data.draw(st.integers(0, 15)) == 0
            and (found := accepted(models.load, single))
        ):
            embedding = np.asarray(found[0].embedding[...], np.float64)
            assert embedding.shape == (7, 16) and np.isfinite(embedding).all()
    finally:
        file.write_bytes(before)
