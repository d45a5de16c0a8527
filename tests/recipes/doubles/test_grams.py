"""What a text is cut into, and that the file holds its distinct grams."""

from pathlib import Path

import numpy as np
import pytest

from recipes.doubles import grams as module
from recipes.doubles.grams import Grams, GramWriter, compared_text, units

CHINESE = "请问今天北京的天气怎么样？"
JAPANESE = "カタカナとひらがなと漢字が混ざった文です。"
THAI = "สวัสดีครับวันนี้อากาศดีมาก"
URL = "https://example.org/a/very/long/path?with=one&more=two"
CODE = "(function(a,b){return(a+b)})(1,2);window.alert(a)"


def written(folder: Path, texts: list[str]) -> Grams:
    writer = GramWriter(folder / "grams")
    for text in texts:
        writer.add(text)
    return writer.finish()


@pytest.mark.parametrize("text", [CHINESE, JAPANESE, THAI, "ສະບາຍດີ", "សួស្តី", "မင်္ဂလာပါ"])
def test_writing_without_spaces_is_cut_into_characters(text: str) -> None:
    assert list(units(text)) == list(text)


def test_between_words_only_the_writing_without_spaces_is_cut() -> None:
    assert units("我用Python 写 code，它\u3000很快") == ["我", "用", "Python", "写", "code", "，", "它", "很", "快"]
    assert units("what does 天气 mean") == ["what", "does", "天", "气", "mean"]


@pytest.mark.parametrize("text", ["Größe und naïveté", "안녕하세요 세계", "Привет, мир", "a b\n\tc"])
def test_words_of_writing_with_spaces_stay_whole(text: str) -> None:
    assert units(text) == text.split()


def test_urls_and_minified_code_are_cut_into_characters_and_stay_whole_in_prose() -> None:
    assert units(URL) == URL
    assert units(f"{CODE}\n{CODE}") == CODE + CODE
    assert URL in units(f"please look at {URL} and say in two or three words what you see there")


def test_the_file_holds_the_distinct_grams_of_every_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["a b c d e f g", "", "a b c", "x " * 30, "a b c d e", "b c d e f g", "a b c"]
    sizes = [3, 1, 1, 1, 1, 2, 1]
    whole = written(tmp_path, texts)
    hashes = [set(whole.of(number).tolist()) for number in range(len(whole))]
    assert [len(own) for own in hashes] == sizes
    assert hashes[4] | hashes[5] == hashes[0] and hashes[2] == hashes[6]
    assert len(set.union(*hashes)) == 3 + 1 + 1 + 1
    monkeypatch.setattr(module, "BATCH", 8)  # so that batches end everywhere
    (tmp_path / "small").mkdir()
    small = written(tmp_path / "small", texts)
    assert [set(small.of(number).tolist()) for number in range(len(small))] == hashes
    batches = list(small.batches())
    assert len(batches) > 1 and [batch.first for batch in batches[1:]] == [batch.last for batch in batches[:-1]]
    by_text = [part for batch in batches for part in np.split(batch.grams, batch.starts[1:])]
    assert [set(part.tolist()) for part in by_text] == hashes


def test_no_texts_have_no_grams(tmp_path: Path) -> None:
    assert len(written(tmp_path, [])) == 0


def test_what_is_said_called_and_thought_is_compared_and_the_system_turn_is_not() -> None:
    call = {"type": "function", "id": "7", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
    turns = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "rain?"},
        {"role": "assistant", "content": "", "reasoning_content": "I look", "tool_calls": [call]},
        {"role": "tool", "content": "no"},
    ]
    said = 'rain? I look {"arguments": {"city": "Rome"}, "name": "weather"} no'
    assert " ".join(compared_text(turns).split()) == said
