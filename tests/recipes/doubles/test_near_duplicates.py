"""Which rows are almost equal: against all pairs compared one by one, and in writing without spaces."""

import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from recipes.data.rows import Side
from recipes.doubles.grams import GRAM, GramWriter, units
from recipes.doubles.near_duplicates import COMPARED, NearDuplicates, near_duplicates

WORDS = [f"w{number}" for number in range(4000)]


def search(
    folder: Path, texts: Sequence[str], sides: Sequence[Side], *, jaccard: float, stay: Sequence[Side] = ("test",)
) -> NearDuplicates:
    """Near-duplicates of rows that are called 0000, 0001 ..."""
    writer = GramWriter(folder / "grams")
    for text in texts:
        writer.add(text)
    names = [f"{number:04}" for number in range(len(texts))]
    return near_duplicates(names, sides, writer.finish(), jaccard=jaccard, stay=stay)


def grams_of(text: str) -> set[tuple[str, ...]]:
    """Its 5-grams, from the text itself."""
    own = units(text)
    return {tuple(own[i : i + GRAM]) for i in range(max(1, len(own) - GRAM + 1))}


def edited(draw: random.Random) -> tuple[list[str], list[Side]]:
    """Texts of 10 to 90 words, and of each 3 copies with up to 3 words replaced at their end, on any side."""
    texts: list[str] = []
    for _ in range(60):
        words = draw.choices(WORDS, k=draw.randint(10, 90))
        texts += [" ".join([*words[: len(words) - cut], *draw.choices(WORDS, k=cut)]) for cut in (0, 1, 2, 3)]
    draw.shuffle(texts)
    sides: list[Side] = [draw.choice(("train", "train", "dev", "test")) for _ in texts]
    return texts, sides


@pytest.mark.parametrize("stay", [("test",), ("test", "dev")])
@pytest.mark.parametrize("jaccard", [0.5, 0.8, 0.9, 0.95])
def test_pairs_are_those_that_comparing_all_rows_gives(tmp_path: Path, jaccard: float, stay: tuple[Side, ...]) -> None:
    texts, sides = edited(random.Random(0))
    sets = [grams_of(text) for text in texts]

    def similarity(row: int, other: int) -> float:
        return len(sets[row] & sets[other]) / len(sets[row] | sets[other])

    expected: dict[str, list[str]] = {}  # every row that a pair may name
    kept: list[int] = []
    for row in sorted(range(len(texts)), key=lambda row: (("test", "dev", "train").index(sides[row]), row)):
        like = [other for other in kept if similarity(row, other) >= jaccard]
        if like:
            expected[f"{row:04}"] = [f"{other:04}" for other in like]
        if not like or sides[row] in stay:
            kept.append(row)
    result = search(tmp_path, texts, sides, jaccard=jaccard, stay=stay)
    pairs = dict(result.pairs)
    at_stake = expected.keys() | pairs.keys()
    assert len(expected) > 40 and result.limited == 0
    for row, like in pairs.items():
        assert similarity(int(row), int(like)) >= jaccard  # never one below the limit
    equal = [row for row in at_stake if row in expected and pairs.get(row) in expected[row]]
    assert len(equal) >= 0.9 * len(at_stake)  # 8 in 10 of those just at the limit, more above it


def test_every_text_is_found_that_stands_there_twice(tmp_path: Path) -> None:
    texts, _ = edited(random.Random(1))
    twice = [*dict.fromkeys(texts), *dict.fromkeys(texts)]
    half = len(twice) // 2
    result = search(tmp_path, twice, ["test"] * half + ["train"] * half, jaccard=0.999)
    assert [pair for pair in result.pairs if int(pair.row) >= half] == [
        (f"{half + row:04}", f"{row:04}") for row in range(half)
    ]


def test_rows_of_one_form_are_compared_with_the_first_hundred(tmp_path: Path) -> None:
    form = " ".join(WORDS[:95])
    texts = [f"{form} {' '.join(random.Random(row).choices(WORDS[100:], k=4))}" for row in range(300)]
    result = search(tmp_path, texts, ["train"] * 300, jaccard=0.95)  # 91 of 99 grams are shared: 0.919
    assert result.pairs == [] and 0 < result.limited <= 300 - COMPARED
    last = [*texts, texts[0]]
    assert search(tmp_path, last, ["train"] * 301, jaccard=0.95).pairs == [("0300", "0000")]


STORIES = {
    "Chinese": "从前有一位老渔夫住在海边的小村子里，他每天清晨都划着木船出海，希望能捕到一条大鱼带回家给孙女看看。"
    "有一天风浪很大，村里的人都劝他留下，可是他笑着摇了摇头，说海水比任何人都更了解他的脾气。",
    "Japanese": "昔々、海の近くの小さな村に年老いた漁師が住んでいて、毎朝早くから木の舟で沖へ出かけていきました。"
    "ある日、風がとても強かったので村の人たちは止めましたが、彼は首を振って静かに笑うだけでした。",
    "Thai": "กาลครั้งหนึ่งมีชาวประมงชราอาศัยอยู่ในหมู่บ้านเล็กๆริมทะเลเขาออกเรือไปจับปลาทุกเช้าก่อนพระอาทิตย์ขึ้น"
    "วันหนึ่งลมแรงมากเพื่อนบ้านจึงขอให้เขาอยู่บ้านแต่เขาเพียงยิ้มและส่ายหน้า",
    "URL": "https://example.org/harbour/boats/2024/old-wooden-ones?sort=length&from=north&colour=blue&oars=2&sail=none"
    "&captain=unknown#photographs-of-the-morning",
}


@pytest.mark.parametrize("language", STORIES)
def test_twins_without_spaces_are_found(tmp_path: Path, language: str) -> None:
    """By words, one changed character would make another text of it."""
    story = STORIES[language]
    twin, other = story[:-2] + "x" + story[-1], "".join(sorted(story))
    result = search(tmp_path, [story, twin, other], ["test", "train", "train"], jaccard=0.9)
    assert result.pairs == [("0001", "0000")]


def test_texts_without_a_word_are_equal_and_no_rows_are_none(tmp_path: Path) -> None:
    assert search(tmp_path, ["", " \n", "a"], ["train"] * 3, jaccard=0.9).pairs == [("0001", "0000")]
    assert search(tmp_path, [], [], jaccard=0.9) == ([], 0)


def test_memory_grows_by_rows_and_not_by_texts(tmp_path: Path) -> None:
    """10,000 rows of 200 words: their grams as Python sets would be some 150 MB."""
    code = """
import random, resource, sys
from pathlib import Path
from recipes.doubles.grams import GramWriter
from recipes.doubles.near_duplicates import near_duplicates
words = [f"w{number}" for number in range(4000)]
def grown(rows):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    writer = GramWriter(Path(sys.argv[1]) / str(rows))
    for row in range(rows):
        start = random.Random(row // 2).randrange(4000)
        writer.add(" ".join([str(row // 2), *words[start:], *words[:start]][:200]))
    names, sides = [f"{row:06}" for row in range(rows)], ["train"] * rows
    assert len(near_duplicates(names, sides, writer.finish(), jaccard=0.9).pairs) >= rows / 2
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
grown(1000)  # what numpy takes for a batch, whatever comes
print(grown(10000))
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 20_000  # KiB
    assert (tmp_path / "10000").stat().st_size > 15_000_000


def test_checking_a_recipe_does_not_import_numpy() -> None:
    code = "import sys, recipes.checks.check; print([m for m in ('numpy', 'xxhash') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
