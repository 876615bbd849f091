"""``--config``: the options of a command from a TOML file, or from the metadata of a file that was made before."""

import difflib
import json
import tomllib
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from halfbyte.errors import UsageError

# Of these, what the command line says goes before what the file says in another form.
_EITHER = (
    ({"bits"}, {"weight_bits", "activation_bits"}),
    ({"calibration"}, {"data_free"}),
    ({"resume"}, {"overwrite"}),
)
_PREPROCESS = {"size", "resize", "crop", "interpolation", "color", "mean", "std"}
# How one run goes says nothing about the result.
_OF_ONE_RUN = {"config", "print_config", "as_json", "quiet", "resume", "overwrite", "dry_run"}


class Configured(click.Command):
    """A command whose options and arguments are also keys of ``--config FILE``; the command line wins."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        told = "Options from a TOML file, or as an exported .onnx file remembers them; the command line wins."
        self.params += [
            click.Option(["--config"], metavar="FILE", is_eager=True, expose_value=False, callback=_load, help=told),
            click.Option(["--print-config"], is_flag=True, help="Print all options as a TOML file, and do nothing."),
        ]

    def invoke(self, ctx: click.Context) -> Any:
        """Let the command line win over the file where they say the same thing in different forms; then go on."""
        given = {name for name in ctx.params if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE}
        for pair in (*_EITHER, ({"preprocess_file"}, _PREPROCESS)):
            for mine, others in (pair, pair[::-1]):
                if mine & given:
                    ctx.params.update({o: _nothing(ctx.params[o]) for o in others - given if _from_file(ctx, o)})
        if ctx.params.pop("print_config"):
            click.echo(self.as_toml(ctx.params), nl=False)
            return None
        return super().invoke(ctx)

    def as_toml(self, values: dict[str, Any]) -> str:
        """All options with their values; what has none is a comment."""
        lines = []
        for p in self.get_params(click.get_current_context()):
            if p.name not in values or p.name in _OF_ONE_RUN:
                continue
            value, about = values[p.name], getattr(p, "help", None)
            if about:
                lines.append(f"# {' '.join(str(about).split())}")
            lines.append(f"# {key_of(p)} =" if value is None else f"{key_of(p)} = {_toml(value)}")
        return "\n".join(lines) + "\n"


def key_of(p: click.Parameter) -> str:
    """The long option without its dashes, or the name of an argument."""
    longest = max(p.opts, key=len)
    return longest.lstrip("-")


def _nothing(value: Any) -> Any:
    return False if isinstance(value, bool) else None


def _from_file(ctx: click.Context, name: str) -> bool:
    return name in ctx.params and ctx.get_parameter_source(name) is ParameterSource.DEFAULT_MAP


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    if isinstance(value, str):
        # a TOML string is a JSON string, but for one control character that JSON lets through
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value)


def _load(ctx: click.Context, _: click.Parameter, file: str | None) -> None:
    if file is None:
        return
    values = _of_model(file) if file.endswith(".onnx") else _of_toml(file)
    parameters = {key_of(p): p for p in ctx.command.params if p.name not in ("config", "print_config", "help")}
    found: dict[str, Any] = {}
    for key, value in values.items():
        p = parameters.get(key.replace("_", "-"))
        if p is None:
            near = difflib.get_close_matches(key.replace("_", "-"), parameters, 1, 0.0)[0]
            raise UsageError(f"'{file}': unknown key '{key}'; did you mean '{near}'?")
        if str(p.name) in found:
            raise UsageError(f"'{file}': '{key}' is given twice, with dash and underscore")
        found[str(p.name)] = _as_given(p, value, f"'{file}': {key}")
    ctx.default_map = found


def _as_given(p: click.Parameter, value: Any, where: str) -> Any:
    """A value of the file as click would get it from the command line."""
    flag = getattr(p, "is_flag", False)
    if isinstance(value, dict) or flag is not isinstance(value, bool):
        wanted = "true or false" if flag else "a number or a text"
        raise UsageError(f"{where} = {value!r} is not {wanted}")
    if getattr(p, "multiple", False):
        return [str(v) for v in (value if isinstance(value, list) else [value])]
    if isinstance(value, list):  # size = [256, 192], mean = [123.7, 116.3, 103.5]
        return ("x" if p.name == "size" else ",").join(map(str, value))
    return str(value) if not flag else value


def _of_toml(file: str) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"the configuration '{file}' cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise UsageError(f"the configuration '{file}' is not valid TOML: {error}") from error


def _of_model(file: str) -> dict[str, Any]:
    """Options out of the metadata of an exported file. Networks and data are named without the folders they lay in."""
    import onnx

    try:
        model = onnx.load(file, load_external_data=False)
        stored = {p.key: p.value for p in model.metadata_props}
        values = dict(json.loads(stored["halfbyte.configuration"]))
    except KeyError as error:
        raise UsageError(f"'{file}' holds no configuration: this Halfbyte did not make it") from error
    except Exception as error:
        raise UsageError(f"'{file}' cannot be read as an ONNX file: {type(error).__name__}") from error
    preprocess = values.pop("preprocess", None) or {}
    if values.get("time_limit") is not None:
        values["time_limit"] = f"{values['time_limit']}s"
    values |= {
        "set": values.pop("sets", []),
        "range": values.pop("ranges", []),
        "input": values.pop("input_type", None),
    }
    values["data_free"] = values.get("calibration") is None
    return {k: v for k, v in {**values, **preprocess}.items() if v is not None}
