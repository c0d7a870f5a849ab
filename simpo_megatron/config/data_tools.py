"""The flags of the tools that turn rows into pairs as training does."""

from __future__ import annotations

import argparse

from simpo_megatron.config.arguments import add_settings, build_group, settings_parser, with_file
from simpo_megatron.config.data import OPTIONS, DataConfig
from simpo_megatron.program import Parser

DATA_SETTINGS = (*OPTIONS, "seq_length")


def data_parser(program: str, description: str | None) -> Parser:
    """A parser with training's flags for how rows become pairs; the tool adds its own.

    Args:
        program: the command, for the usage line.
        description: what the tool does.
    """
    parser = settings_parser(
        program, description, "YAML file of a run: the settings below are read from it and its preset"
    )
    add_settings(parser.add_argument_group("rows to pairs, as in training"), DataConfig, DATA_SETTINGS)
    return parser


def data_config(args: argparse.Namespace) -> DataConfig:
    """The data settings of a tool: the flags of `data_parser` over its --config, with training's defaults."""
    settings = with_file(vars(args))
    return build_group(DataConfig, {name: settings[name] for name in DATA_SETTINGS if name in settings})
