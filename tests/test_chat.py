"""`qdora chat`: histories, streams, commands and the terminal, on tiny models."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

import qdora
from qdora.arithmetic import training_dtype
from qdora.conversation import Conversation, Sampling, _Stream
from qdora.errors import CheckpointError, ConfigError, DataError, NumericsError, QDoRAError
from qdora.inject import adapters_disabled
from qdora.verbs.chat import HELP, Terminal, _remembered_interrupt, chat, converse
from tests.conftest import make_model, make_tokenizer

ROOT = Path(__file__).parents[1]
USUAL = training_dtype(torch.device("cpu"))
QUESTIONS = ("How many apples?", "Count from 0 to 9.", "Monday or Tuesday?")


class Script:
    """A terminal whose lines are written beforehand, and whose screen can be read."""

    def __init__(self, *lines: str | BaseException, interactive: bool = True) -> None:
        self.lines = iter(lines)
        self.signs: list[str] = []
        self.pieces: list[str] = []
        self.notes: list[str] = []
        self.terminal = Terminal(self._read, self.pieces.append, self.notes.append, interactive)

    def _read(self, sign: str) -> str:
        self.signs.append(sign)
        line = next(self.lines, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    @property
    def answers(self) -> str:
        return "".join(self.pieces)


@pytest.fixture(scope="module")
def model(tiny_nf4: Path, tiny_adapter: Path) -> Any:
    # In fp32: in bf16 two tokens of a random model may be as likely, and a cache decides between them by its rounding.
    return qdora.load_model(tiny_nf4, adapter=tiny_adapter, device="cpu", dtype="float32").eval()


@pytest.fixture(autouse=True)
def restored(model: Any) -> Iterator[None]:
    """The model as it was, for the next test."""
    limit, own = model.config.max_position_embeddings, copy.deepcopy(model.generation_config)
    yield
    model.config.max_position_embeddings, model.generation_config = limit, own


def talk(model: Any, tokenizer: Any, tokens: int = 12, **changes: Any) -> Conversation:
    settings = {name: changes.pop(name) for name in ("temperature", "top_p", "seed") if name in changes}
    return Conversation(model, tokenizer, Sampling(tokens, **settings), **changes)


def expected(model: Any, tokenizer: Any, messages: list[dict[str, str]], tokens: int = 12) -> str:
    """The greedy answer, a token at a time, each from the whole text anew."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return continued(model, tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"], tokens)


@torch.no_grad()
def continued(model: Any, tokenizer: Any, ids: list[int], tokens: int = 12) -> str:
    new: list[int] = []
    while len(new) < tokens:
        token = int(model(input_ids=torch.tensor([[*ids, *new]]), use_cache=False).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        new.append(token)
    return str(tokenizer.decode(new, skip_special_tokens=True))


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_answers_are_the_greedy_ones_and_the_history_is_before_them(model: Any, tokenizer: Any) -> None:
    voice, messages = talk(model, tokenizer, system="Be short."), [{"role": "system", "content": "Be short."}]
    for question in QUESTIONS:
        messages.append(user(question))
        pieces: list[str] = []
        answer = voice.ask(question, pieces.append)
        assert answer.text == "".join(pieces) == expected(model, tokenizer, messages)
        assert len(pieces) > 1
        messages.append(assistant(answer.text))
    assert voice.turns == [(q["content"], a["content"]) for q, a in zip(messages[1::2], messages[2::2], strict=True)]
    voice.forget()
    assert voice.ask(QUESTIONS[0]).text == expected(model, tokenizer, [messages[0], user(QUESTIONS[0])])


def test_the_two_voices_are_the_base_and_the_adapter_with_histories_of_their_own(model: Any, tokenizer: Any) -> None:
    script = Script(*QUESTIONS[:2])
    voices = {
        "without": talk(model, tokenizer, use_adapter=False),
        "with": talk(model, tokenizer),
    }
    converse(voices, script.terminal)
    given: dict[str, list[str]] = {"without": [], "with": []}
    for name, history in given.items():
        messages = []
        for question in QUESTIONS[:2]:
            messages.append(user(question))
            if name == "with":
                history.append(expected(model, tokenizer, messages))
            else:
                with adapters_disabled(model):
                    history.append(expected(model, tokenizer, messages))
            messages.append(assistant(history[-1]))
    assert given["without"][0] != given["with"][0]
    assert script.answers == "".join(
        f"── without ──\n{base}\n── with ──\n{adapted}\n\n"
        for base, adapted in zip(given["without"], given["with"], strict=True)
    ) + ("\n")


def test_the_model_s_own_generation_config_has_no_say(model: Any, tokenizer: Any) -> None:
    plain = talk(model, tokenizer).ask(QUESTIONS[0]).text
    model.generation_config.update(do_sample=True, temperature=1.7, top_k=3, repetition_penalty=9.0, min_new_tokens=5)
    config = model.generation_config
    assert talk(model, tokenizer).ask(QUESTIONS[0]).text == plain
    assert model.generation_config is config


def test_a_seed_decides_what_is_drawn_for_both_voices_alike(model: Any, tokenizer: Any) -> None:
    def drawn(**settings: Any) -> list[str]:
        voice = talk(model, tokenizer, **settings)
        return [voice.ask(QUESTIONS[0]).text, voice.ask(QUESTIONS[0]).text]

    first = drawn(temperature=1.5, seed=3)
    assert first == drawn(temperature=1.5, seed=3)
    assert first != drawn(temperature=1.5, seed=4)
    assert drawn(temperature=1.5, top_p=1e-9) == drawn()  # only the likeliest token is left


def test_sampling_is_the_softmax_s(model: Any, tokenizer: Any) -> None:
    """Not of the 50 likeliest tokens only, which is transformers' default: all of them turn up."""
    prompt = tokenizer("How")["input_ids"]
    base = model.get_output_embeddings().weight.shape[0]
    config = Sampling(1, temperature=1000.0).config(1, [], 0)
    torch.manual_seed(0)
    rows = torch.tensor([prompt]).repeat(1000, 1)
    own, model.generation_config = model.generation_config, config
    tokens = model.generate(input_ids=rows, attention_mask=torch.ones_like(rows), generation_config=config)
    model.generation_config = own
    assert len(set(tokens[:, -1].tolist())) > 0.8 * base


@pytest.mark.parametrize(
    "changes", [{"max_new_tokens": 0}, {"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}]
)
def test_wrong_settings_are_named(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(changes))):
        Sampling(**changes)


def test_pieces_make_the_text_of_the_whole(tokenizer: Any) -> None:
    texts = ["naïve 日本語 ありがとう 🙂🙂\n\n    indented\tand  spaced .", "", " ", "<|im_start|>a<|im_end|> b"]
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        pieces: list[str] = []
        stream = _Stream(tokenizer, [], pieces.append)
        stream.put(torch.tensor([[1, 2, 3]]))  # the prompt
        for token in ids:
            stream.put(torch.tensor([token]))
        stream.end()
        assert "".join(pieces) == stream.text == tokenizer.decode(ids, skip_special_tokens=True)
        assert not any("\ufffd" in piece for piece in pieces)


def test_spaces_stay_with_tokenizers_that_drop_the_first_one() -> None:
    words = {"▁one": 0, "▁two": 1, "\n": 2, "▁": 3, "<|end|>": 4}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<|end|>"))
    tokenizer.decoder = decoders.Metaspace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    ids = [0, 1, 2, 3, 0, 4, 1, 1, 2, 2, 0]
    stream = _Stream(fast, [], lambda piece: None)
    stream.put(torch.tensor([[0]]))
    for token in ids:
        stream.put(torch.tensor([token]))
    stream.end()
    assert stream.text == fast.decode(ids, skip_special_tokens=True) == "one two\n  one two two\n\n one"


def test_bytes_that_are_no_text_are_shown_at_the_end(tokenizer: Any) -> None:
    ids = tokenizer("🙂")["input_ids"][:2]
    pieces: list[str] = []
    stream = _Stream(tokenizer, [], pieces.append)
    stream.put(torch.tensor([[0]]))
    stream.put(torch.tensor(ids))
    assert not pieces
    stream.end()
    assert "".join(pieces) == tokenizer.decode(ids)


def test_the_token_that_ends_a_turn_of_the_template_ends_an_answer(model: Any) -> None:
    tokenizer = make_tokenizer()
    ending = tokenizer.convert_tokens_to_ids("<|im_end|>")
    tokenizer.eos_token = "<|end|>"
    model.generation_config.eos_token_id = None
    voice = talk(model, tokenizer)
    assert voice._ends == sorted({ending, tokenizer.eos_token_id})
    model.generation_config.eos_token_id = [5, 7]
    assert {5, 7} <= set(talk(model, tokenizer)._ends)


def test_an_answer_that_ends_by_itself_is_not_called_cut(model: Any, tokenizer: Any) -> None:
    answer = talk(model, tokenizer, 4).ask(QUESTIONS[0])
    assert answer.cut
    assert answer.tokens == 4
    text = tokenizer.apply_chat_template([user(QUESTIONS[0])], tokenize=False, add_generation_prompt=True)
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        model.generation_config.eos_token_id = int(model(input_ids=ids).logits[0, -1].argmax())
    answer = talk(model, tokenizer, 4).ask(QUESTIONS[0])
    assert (answer.text, answer.tokens, answer.cut) == ("", 1, False)


def test_the_oldest_turns_make_room_and_the_system_message_stays(model: Any, tokenizer: Any) -> None:
    voice = talk(model, tokenizer, 20, system="Be short.")
    system = {"role": "system", "content": "Be short."}
    lengths = []
    model.config.max_position_embeddings = 120
    forgotten = 0
    for number in range(5):
        question = f"Question {number}?"
        answer = voice.ask(question)
        forgotten += answer.forgotten
        lengths.append(len(voice.turns))
        messages = [system]
        for asked, answered in voice.turns[:-1]:
            messages += [user(asked), assistant(answered)]
        assert answer.text == expected(model, tokenizer, [*messages, user(question)], 20)
        ids = tokenizer.apply_chat_template([*messages, user(question)], add_generation_prompt=True, return_dict=True)
        assert len(ids["input_ids"]) + 20 <= 120
    assert forgotten == 5 - lengths[-1] > 0
    script = Script("One more question, please?")
    converse({"": voice}, script.terminal)
    assert any("forgotten" in note for note in script.notes)


def test_a_question_longer_than_the_model_is_said_and_not_remembered(model: Any, tokenizer: Any) -> None:
    model.config.max_position_embeddings = 64
    voice = talk(model, tokenizer, 512)
    assert voice.ask("Hi").tokens <= 64
    turns = list(voice.turns)
    script = Script("apples " * 100, "Hi")
    converse({"": voice}, script.terminal)
    assert sum("the model takes 64; shorten it" in note for note in script.notes) == 1
    assert voice.turns[-1][0] == "Hi"
    assert all(len(asked) < 10 for asked, _ in [*turns, *voice.turns])


def test_what_is_not_answered_is_named_and_no_success(model: Any, tokenizer: Any, tiny: Path) -> None:
    long = "apples " * 1000
    model.config.max_position_embeddings = 64
    script = Script("Hi", long, "And?", interactive=False)
    with pytest.raises(ConfigError, match=r"^1 of 3 questions not answered \(question 2\); the notes above say why$"):
        converse({"": talk(model, tokenizer)}, script.terminal)
    (note,) = [note for note in script.notes if "shorten it" in note]
    assert note.startswith("question 2: the question is ")
    script = Script()
    with pytest.raises(ConfigError, match=r"^2 of 3 prompts not answered \(prompt 1, 3\); the notes above say why$"):
        chat(tiny, prompts=[long, "Hi", long], max_new_tokens=8, device="cpu", terminal=script.terminal)
    assert script.answers.strip() == say(tiny, "Hi").answers.strip()


def test_without_a_template_texts_are_continued_as_they_stand(model: Any) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    voice = talk(model, tokenizer)
    for text in QUESTIONS[:2]:
        assert voice.ask(text).text == continued(model, tokenizer, tokenizer(text)["input_ids"])
    with pytest.raises(ConfigError, match="no chat template"):
        voice.set_system("Be short.")
    with pytest.raises(ConfigError, match="no chat template"):
        talk(model, tokenizer, system="Be short.")


def test_a_template_that_refuses_is_quoted(model: Any) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        + tokenizer.chat_template
    )
    script = Script("/system Be short.", "Hi")
    voice = talk(model, tokenizer)
    converse({"": voice}, script.terminal)
    assert any("no system role" in note for note in script.notes)
    assert voice.system is None
    assert voice.turns[0][0] == "Hi"


def test_the_commands(model: Any, tokenizer: Any) -> None:
    voice = talk(model, tokenizer, 3)
    script = Script(
        "Hi", "/new", "/system  Be short.\\", "Very.", "/SYSTEM", "/help", "/nonsense", "", "/exit", "Never"
    )
    converse({"": voice}, script.terminal)
    assert script.notes == [
        "/help lists the commands",
        "(cut after 3 tokens)",
        "the conversation is forgotten",
        "the system message is set",
        "there is no system message now",
        HELP,
        "no command /nonsense; /help lists them",
    ]
    assert voice.turns == []
    assert voice.system is None
    assert script.signs == ["> ", "> ", "> ", "… ", "> ", "> ", "> ", "> ", "> "]


def test_the_system_message_is_before_the_next_answer(model: Any, tokenizer: Any) -> None:
    voice = talk(model, tokenizer)
    converse({"": voice}, Script("/system Be short.\\", "Very.", "Hi").terminal)
    messages = [{"role": "system", "content": "Be short.\nVery."}, user("Hi")]
    assert voice.turns == [("Hi", expected(model, tokenizer, messages))]


def test_lines_that_end_in_a_backslash_go_on_and_paths_are_no_commands(model: Any, tokenizer: Any) -> None:
    voice = talk(model, tokenizer, 2)
    converse({"": voice}, Script("one\\", "two\\", "three", " /new", "/etc/hosts is?", "the end\\").terminal)
    assert [asked for asked, _ in voice.turns] == ["one\ntwo\nthree", " /new", "/etc/hosts is?", "the end"]


def test_ctrl_c_at_the_prompt_ends_the_chat_but_a_pipe_is_interrupted(model: Any, tokenizer: Any) -> None:
    converse({"": talk(model, tokenizer)}, Script(KeyboardInterrupt()).terminal)
    with pytest.raises(KeyboardInterrupt):
        converse({"": talk(model, tokenizer)}, Script(KeyboardInterrupt(), interactive=False).terminal)


def interrupted(script: Script, after: int, times: int = 1) -> Terminal:
    """The script's terminal, before which somebody presses Ctrl-C once so many pieces came."""

    def write(piece: str) -> None:
        script.pieces.append(piece)
        if len(script.pieces) == after:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)

    return Terminal(script.terminal.read, write, script.terminal.note, script.terminal.interactive)


def test_ctrl_c_stops_an_answer_and_the_chat_goes_on(model: Any, tokenizer: Any) -> None:
    handler = signal.getsignal(signal.SIGINT)
    script, voice = Script("Hi", "And now?"), talk(model, tokenizer, 30)
    converse({"": voice}, interrupted(script, after=3))
    assert script.notes[1] == "(stopped)"
    (first, stopped), (second, whole) = voice.turns
    assert (first, second) == ("Hi", "And now?")
    assert stopped == "".join(script.pieces[:3])
    assert whole == expected(model, tokenizer, [user("Hi"), assistant(stopped), user("And now?")], 30)
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.parametrize(("times", "interactive"), [(2, True), (1, False)])
def test_ctrl_c_twice_and_in_a_pipe_end_everything(model: Any, tokenizer: Any, times: int, interactive: bool) -> None:
    handler = signal.getsignal(signal.SIGINT)
    script = Script("Hi", interactive=interactive)
    with pytest.raises(KeyboardInterrupt):
        converse({"": talk(model, tokenizer, 30)}, interrupted(script, 3, times))
    assert signal.getsignal(signal.SIGINT) is handler


def test_another_thread_leaves_signals_alone() -> None:
    found: list[bool] = []

    def within() -> None:
        with _remembered_interrupt() as stopped:
            found.append(stopped())

    thread = threading.Thread(target=within)
    thread.start()
    thread.join()
    assert found == [False]


def test_logits_that_are_not_finite_are_an_error(tiny: Path, tokenizer: Any) -> None:
    broken = qdora.load_model(tiny, load_in_4bit=False, device="cpu").eval()
    broken.get_submodule("model.norm").weight.data.fill_(float("nan"))
    with pytest.raises(NumericsError, match="not finite"):
        talk(broken, tokenizer).ask("Hi")


@pytest.mark.parametrize("line", [UnicodeDecodeError("utf-8", b"\xff", 0, 1, "no"), "lone \udcff"])
def test_what_is_not_utf_8_is_an_error(model: Any, tokenizer: Any, line: Any) -> None:
    with pytest.raises(DataError, match="UTF-8"):
        converse({"": talk(model, tokenizer)}, Script(line, interactive=False).terminal)


# The verb: what it loads.


def say(path: Path, *prompts: str, **arguments: Any) -> Script:
    script = Script(interactive=False)
    chat(path, prompts=prompts, max_new_tokens=8, device="cpu", terminal=script.terminal, **arguments)
    return script


def test_prompts_are_one_conversation_and_no_commands(tiny_nf4: Path, tiny_adapter: Path, tokenizer: Any) -> None:
    script = say(tiny_nf4, "Hi", "/new", adapter=tiny_adapter)
    model = qdora.load_model(tiny_nf4, adapter=tiny_adapter, device="cpu").eval()
    first = expected(model, tokenizer, [user("Hi")], 8)
    second = expected(model, tokenizer, [user("Hi"), assistant(first), user("/new")], 8)
    assert script.answers == f"{first}\n{second}\n"
    assert f"{tiny_nf4} with {tiny_adapter}: NF4 weights, {USUAL} on cpu" in script.notes[0]


def test_compare_answers_without_and_with(tiny_nf4: Path, tiny_adapter: Path) -> None:
    script = say(tiny_nf4, "Hi", adapter=tiny_adapter, compare=True)
    without, with_ = say(tiny_nf4, "Hi").answers, say(tiny_nf4, "Hi", adapter=tiny_adapter).answers
    assert without != with_
    assert script.answers == f"── without the adapter ──\n{without}── with the adapter ──\n{with_}"
    with pytest.raises(ConfigError, match="--adapter"):
        say(tiny_nf4, "Hi", compare=True)


def test_a_16_bit_model_is_rounded_only_for_an_adapter_that_was_trained_so(
    tiny: Path, tiny_nf4: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    assert f"16-bit weights, {USUAL}" in say(tiny, "Hi").notes[0]
    rounded = say(tiny, "Hi", adapter=tiny_adapter)
    assert "rounded to NF4" in rounded.notes[0]
    assert rounded.answers == say(tiny_nf4, "Hi", adapter=tiny_adapter).answers
    assert "16-bit weights" in say(tiny, "Hi", adapter=tiny_adapter, load_in_4bit=False).notes[0]
    dense = qdora.load_model(tiny, adapter=qdora.AdapterConfig(rank=4), load_in_4bit=False, device="cpu")
    qdora.save_adapter(dense, tmp_path / "dense")
    assert "16-bit weights" in say(tiny, "Hi", adapter=tmp_path / "dense").notes[0]
    qdora.quantize(tiny, tmp_path / "odd", double_quant=False)
    odd = qdora.load_model(tmp_path / "odd", adapter=qdora.AdapterConfig(rank=4), device="cpu")
    qdora.save_adapter(odd, tmp_path / "custom")
    with pytest.raises(CheckpointError, match="not quantized in the usual way"):
        say(tiny, "Hi", adapter=tmp_path / "custom")
    assert "NF4 weights" in say(tmp_path / "odd", "Hi", adapter=tmp_path / "custom").notes[0]


def test_a_merged_model_loses_no_bits(tiny_nf4: Path, tiny_adapter: Path, tokenizer: Any, tmp_path: Path) -> None:
    qdora.merge(tiny_nf4, tiny_adapter, tmp_path / "merged", verify=False)
    script = say(tmp_path / "merged", "Hi")
    assert "16-bit weights, float32" in script.notes[0]
    plain = qdora.load_model(tmp_path / "merged", load_in_4bit=False, dtype="float32", device="cpu").eval()
    assert script.answers == expected(plain, tokenizer, [user("Hi")], 8) + "\n"


def test_the_adapter_s_template_is_used_if_it_has_one(tiny_nf4: Path, tiny_adapter: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(tiny_adapter, adapter)
    assert say(tiny_nf4, "Hi", adapter=adapter).notes[0].endswith("the chat template of the model")
    other = make_tokenizer()
    other.chat_template = (
        "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"
    )
    other.save_pretrained(adapter)
    script = say(tiny_nf4, "Hi", adapter=adapter)
    assert script.notes[0].endswith("the chat template of the adapter")
    model = qdora.load_model(tiny_nf4, adapter=adapter, device="cpu").eval()
    assert script.answers == expected(model, other, [user("Hi")], 8) + "\n"
    other.add_tokens([f"<new-{i}>" for i in range(200)])
    other.save_pretrained(adapter)
    assert say(tiny_nf4, "Hi", adapter=adapter).answers == script.answers
    with pytest.raises(CheckpointError, match="embeddings"):
        say(tiny_nf4, "Hi <new-199>", adapter=adapter)
    (adapter / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="no usable tokenizer"):
        say(tiny_nf4, "Hi", adapter=adapter)


def test_an_adapter_for_another_model_is_refused(tiny_adapter: Path, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", hidden_size=128)
    with pytest.raises(CheckpointError, match="the adapter is for another model"):
        say(other, "Hi", adapter=tiny_adapter)


def test_streamed_and_with_the_embedding_on_the_host(tiny: Path, tmp_path: Path) -> None:
    untied = make_model(tmp_path / "untied", tie=False)
    qdora.quantize(untied, tmp_path / "nf4")
    plain = say(tmp_path / "nf4", "Hi").answers
    assert say(tmp_path / "nf4", "Hi", stream_base=True, embedding_on_host=True).answers == plain


def test_a_pipe_gets_the_answers_and_nothing_else(tiny: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    config = json.loads((model / "generation_config.json").read_text())
    config |= {"do_sample": True, "temperature": 0.6, "top_k": 20, "repetition_penalty": 1.3, "max_length": 20}
    (model / "generation_config.json").write_text(json.dumps(config))
    code = f"from {chat.__module__} import chat; chat({str(model)!r}, max_new_tokens=8, device='cpu')"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], input="Hi\n\nAnd?", capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == say(tiny, "Hi", "And?").answers
    remarks = [line for line in done.stderr.splitlines() if not line.startswith("(cut after")]
    assert len(remarks) == 1, done.stderr
    assert remarks[0].startswith(f"{model}: 16-bit weights")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": 2**64}, "seed must be at least 0 and below"),
        ({"seed": -1}, "seed must be at least 0 and below"),
        ({"temperature": 1e-40}, "temperature must be 0"),
        ({"prompts": ["a\udcff"]}, "is not UTF-8 text"),
        ({"system": "a\udcff", "prompts": ["a"]}, "is not UTF-8 text"),
    ],
)
def test_values_that_cannot_be_used(settings: dict[str, Any], message: str, tiny: Path) -> None:
    with pytest.raises(QDoRAError, match=message):
        qdora.chat(tiny, **settings)


def test_an_empty_question_to_a_model_without_a_template(model: Any) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="the question is empty"):
        talk(model, tokenizer).ask("")


def test_a_reader_that_has_had_enough(tiny: Path) -> None:
    command = f"{sys.executable} -m qdora chat {tiny} --prompt hi --max_new_tokens 30 | true"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr
