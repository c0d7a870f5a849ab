"""On-policy data: prompts -> responses of the model -> scores -> pairs, in rounds; and the files of benchmarks.

The programs of tools/ are joined by JSON Lines. Each goes on by prompt id where it was stopped.

Responses:

    prompts.py           prompts with ids, the part of one process, evaluation prompts kept out
    sampling.py          settings of drawing, and a seed for every response
    generation.py        prompts -> responses
    backends/            transformers, vLLM, servers
    benchmarks.py        questions and files of AlpacaEval 2, Arena-Hard-Auto and MT-Bench
    arena_style.py       what Arena-Hard's style control counts
    lengths.py           the length report

Scores and pairs:

    scoring.py           responses -> scored responses
    scorers/             reward models, functions, judges
    verification.py      a judge's second look at pairs

Rounds:

    loop_config.py       the YAML file of a loop
    iteration.py         its stages, each a program

Used by all:

    journal.py           a JSON Lines file that goes on where a killed run stopped
    http_client.py       requests to a server with OpenAI's interface
    registry.py          a line of a registry of backends or scorers
    choice.py            flags of the part that is chosen

For users: `README.md` in this folder.
"""

from __future__ import annotations
