"""What llama.cpp answers with a model that `qdora merge` wrote, beside what transformers answers.

    python scripts/llama_cpp.py MERGED.gguf MERGED NOTES.jsonl      (`scripts/llama_cpp.sh` makes the GGUF file first)

Both answer greedily, from the same chats: llama.cpp through the chat template in the GGUF file, in fp16; transformers
through the tokenizer's, in fp32.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from record import write_result
from tqdm import tqdm
from transformers import AutoModelForCausalLM

import qdora
from qdora.answers import answer, questions
from qdora.data import encode
from qdora.rows import read_rows

Chat = list[dict[str, str]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("merged", type=Path)
    parser.add_argument("notes", type=Path, help="rows of messages that end with the expected answer")
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--out", type=Path, help="a .json file for the figures")
    arguments = parser.parse_args()

    rows = read_rows(arguments.notes)[: arguments.rows]
    chats = [row["messages"] for row in rows]
    served = by_llama_cpp(arguments.gguf, chats, arguments.max_new_tokens)
    reference = by_transformers(arguments.merged, rows, str(arguments.notes))
    for chat, text in list(zip(chats, served, strict=True))[:3]:
        print(f"  {chat[-2]['content']}\n    → {text}")
    expected = [chat[-1]["content"].strip() for chat in chats]
    figures = {
        "rows": len(rows),
        "llama_cpp_exact": agreeing(served, expected),
        "transformers_exact": agreeing(reference, expected),
        "same_answer": agreeing(served, reference),
        "first_answers": [[chat[-2]["content"], text] for chat, text in zip(chats[:3], served[:3], strict=True)],
    }
    print(
        f"exact match of {len(rows)}: llama.cpp {figures['llama_cpp_exact']}, "
        f"transformers {figures['transformers_exact']}; {figures['same_answer']} answers the same, word for word"
    )
    if arguments.out:
        write_result(arguments.out, figures)


def by_llama_cpp(gguf: Path, chats: list[Chat], max_new_tokens: int) -> list[str]:
    """The answer to each chat without its last message."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(gguf)
    params.n_ctx = 2048
    params.verbosity = 0
    for cpu in (params.cpuparams, params.cpuparams_batch):
        cpu.n_threads = torch.get_num_threads()
    server = xllamacpp.Server(params)
    answers = []
    for chat in tqdm(chats, desc="llama.cpp", leave=False):
        asked = {"messages": chat[:-1], "temperature": 0, "max_tokens": max_new_tokens, "cache_prompt": False}
        reply: dict[str, Any] = server.handle_chat_completions(asked)
        if "choices" not in reply:
            raise SystemExit(f"llama.cpp refused: {reply}")
        answers.append(reply["choices"][0]["message"]["content"].strip())
    return answers


def by_transformers(merged: Path, rows: list[dict[str, Any]], source: str) -> list[str]:
    """The same by plain transformers, in fp32."""
    tokenizer = qdora.load_tokenizer(merged)
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    asked = questions(encode(rows, tokenizer, None, source))
    answered = answer(model, tokenizer, asked, progress=lambda batches: tqdm(batches, desc="transformers", leave=False))
    return [each.given for each in answered]


def agreeing(some: list[str], others: list[str]) -> int:
    return sum(a == b for a, b in zip(some, others, strict=True))


if __name__ == "__main__":
    main()
