"""What model.ModelConfig says about its fields when they are wrong, and how it is read from JSON."""

import dataclasses
import difflib
import json

NEEDED = {  # rope_type -> the numbers that it takes
    "linear": ["factor"],
    "llama3": ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"],
}


def check_fields(config, choices: dict[str, tuple[str, ...]]) -> None:
    """Raises ValueError unless each int is from 1, each float above 0, each bool a bool and each str one of its choices."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.type is int and (type(value) is not int or not 1 <= value < 2**31):
            raise ValueError(f"{field.name} = {value!r} is not a whole number of at least 1 and below 2**31")
        if field.type is float and (type(value) not in (int, float) or not 0 < value < 1e30):
            raise ValueError(f"{field.name} = {value!r} is not a number above 0")
        if field.type is bool and type(value) is not bool:
            raise ValueError(f"{field.name} = {value!r} is not true or false")
        if field.type is str and value not in choices[field.name]:
            raise ValueError(f"{field.name} = {value!r} is not one of {', '.join(choices[field.name])}")


def check_rope_scaling(scaling: object) -> None:
    """Raises ValueError unless it is None or what Hugging Face configs hold for one of the types that we compute."""
    if scaling is None:
        return
    if not isinstance(scaling, dict):
        raise ValueError(f"rope_scaling = {scaling!r} is not a dict with a rope_type")
    kind = scaling.get("rope_type")
    if not isinstance(kind, str) or kind not in NEEDED:
        raise ValueError(f'rope_scaling rope_type = {kind!r} is not one of "linear", "llama3"')
    if missing := [k for k in NEEDED[kind] if type(v := scaling.get(k)) not in (int, float) or not 0 < v < 1e30]:
        raise ValueError(f"rope_scaling of type {kind} lacks a number above 0 for {', '.join(missing)}")
    if kind == "llama3" and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise ValueError("rope_scaling of type llama3 has a low_freq_factor that is not below high_freq_factor")
    if unknown := sorted(scaling.keys() - {"rope_type", *NEEDED["llama3"]}):
        raise ValueError(f"rope_scaling has {unknown[0]!r}, which means nothing here")


def from_json(cls: type, text: str):
    """A dataclass from an object in JSON.  Raises ValueError on a missing, unknown or unsuitable field."""
    try:
        values = json.loads(text)
    except RecursionError:
        raise ValueError("lists or objects are nested too deeply") from None
    if not isinstance(values, dict):
        raise ValueError("not a JSON object")
    return from_dict(cls, values)


def from_dict(cls: type, values: dict[str, object]):
    """A dataclass of these fields.  Raises ValueError on a missing, unknown or unsuitable field."""
    fields = dataclasses.fields(cls)
    known = [f.name for f in fields]
    missing = [f.name for f in fields if f.default is dataclasses.MISSING and f.name not in values]
    unknown = [name for name in values if name not in known]
    if missing or unknown:
        near = difflib.get_close_matches(unknown[0], known, n=1) if unknown else []
        raise ValueError("; ".join([f"no value for {', '.join(missing)}"] * bool(missing)
                                   + [f"unknown {', '.join(unknown)}"] * bool(unknown)
                                   + [f"did you mean {name}?" for name in near]))
    return cls(**values)
