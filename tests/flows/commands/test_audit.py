"""`quench audit`: tables as people write them, verdicts in words and JSON, and refusals that name the line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from flows.cli import main
from flows.commands.audit import as_json, print_audited
from flows.commands.audit_table import read_table
from flows.results.audit import audited
from recipes.problem import Problem, RecipeError

HEAD = "name,metric,n,score,base score\n"
ROW = "mine,GSM8K,1319,75.89,75.21\n"


def write(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "table.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def audit(tmp_path: Path, text: str | bytes) -> dict[str, Any]:
    table = read_table(write(tmp_path, text))
    return json.loads(json.dumps(as_json(audited(table.claims), table)))


def one(tmp_path: Path, cells: str, head: str = HEAD) -> dict[str, Any]:
    return audit(tmp_path, f"{head}{cells}\n")["claims"][0]


def refused(tmp_path: Path, text: str | bytes) -> list[Problem]:
    with pytest.raises(RecipeError) as caught:
        read_table(write(tmp_path, text))
    for problem in caught.value.problems:
        assert problem.what and problem.where and problem.why and problem.next
    return list(caught.value.problems)


# ---- verdicts


def test_the_three_verdicts(tmp_path: Path) -> None:
    shown = one(tmp_path, "a,GSM8K,1319,86.43,90.83")
    assert shown["verdict"]["outcome"] == "shown" and shown["questions"] == -58
    assert shown["widest"][1] < 0 and shown["verdict_text"] == "shown whatever the pairing"
    depends = one(tmp_path, "a,GSM8K,1319,75.89,75.21")
    # 9 questions: (9 - 1)^2 / 1.96^2 = 16.7, so at most 15 may differ (9 and pairs of opposite ones).
    assert depends["verdict"] == {"outcome": "depends", "agree": 1304, "correlation": None}
    assert depends["verdict_text"] == "shown only if the two agree on at least 1,304 of 1,319 questions"
    assert depends["narrowest"][0] > 0 > depends["widest"][0]
    assert depends["agree_if_unrelated"] == pytest.approx(1319 * (0.7589 * 0.7521 + 0.2411 * 0.2479), rel=1e-3)
    cannot = one(tmp_path, "a,GPQA,198,66.7,65.7")
    assert cannot["verdict_text"] == "cannot be shown with 198 questions" and cannot["narrowest"][0] < 0
    assert "6 questions are the least" in cannot["text"][1] and "594 questions or more" in cannot["text"][1]


def test_wilson_stands_beside_both_scores(tmp_path: Path) -> None:
    found = one(tmp_path, "a,GPQA,198,66.7,0.0")
    assert found["score_ci95"] == [pytest.approx(0.5984, abs=1e-4), pytest.approx(0.7286, abs=1e-4)]
    assert found["base_ci95"][0] == 0 < found["base_ci95"][1]


def test_recovery_in_questions(tmp_path: Path) -> None:
    """The example of docs/report.md: two of three lost questions."""
    head = "name,metric,n,score,base score,lost score,recovery\n"
    found = one(tmp_path, "our QAT,GPQA diamond,198,66.7 %,67.2 %,65.7 %,66.9 %", head)["recovery"]
    assert (found["returned"], found["lost"], found["stated"]) == (2, 3, 0.669)
    assert found["value"] == pytest.approx(2 / 3)
    assert found["loss"]["outcome"] == found["gain"]["outcome"] == "cannot"
    alone = one(tmp_path, "our QAT,GPQA diamond,198,66.7 %,67.2 %,,66.9 %", head)["recovery"]
    assert (alone["returned"], alone["lost"]) == (2, 3)  # the score after the loss follows from the recovery
    real = one(tmp_path, "our QAT,GSM8K,1319,81.6 %,85.1 %,77.4 %,", head)
    assert real["recovery"]["loss"]["outcome"] == real["recovery"]["gain"]["outcome"] == "shown"
    assert "says nothing" not in " ".join(real["text"])


@pytest.mark.parametrize(
    ("cells", "said"),
    [
        ("a,x,1000,82.5 %,83.0 %,,99.4 %", "score / base score"),
        ("a,x,1000,82.5 %,83.0 %,83.0 %,50 %", "nothing was lost"),
        ("a,x,1000,82.5 %,83.0 %,,100 %", "no score after the loss"),
        ("a,x,1000,82.5 %,83.0 %,,99.99 %", "no score after the loss"),
    ],
)
def test_recoveries_that_are_none(tmp_path: Path, cells: str, said: str) -> None:
    found = one(tmp_path, cells, "name,metric,n,score,base score,lost score,recovery\n")
    assert said in found["recovery"]["reason"] and said in " ".join(found["text"])


def test_only_a_difference_is_published(tmp_path: Path) -> None:
    head = "name,metric,n,score,base score,difference,recovery\n"
    found = one(tmp_path, "a,GPQA,198,,,+1.0 %,66.9 %", head)
    assert (found["questions"], found["verdict"]["outcome"], found["score"]) == (2, "cannot", None)
    assert (found["recovery"]["returned"], found["recovery"]["lost"]) == (2, 3)
    large = one(tmp_path, "a,GPQA,198,,,-20 points,", head)
    assert large["verdict"]["outcome"] == "shown" and large["questions"] == -40  # 39^2 / 1.96^2 = 396: more than 198
    assert one(tmp_path, "a,GPQA,198,60 %,65 %,-20 points,", head)["difference"] == pytest.approx(-0.05)


def test_a_score_that_is_no_count_is_named(tmp_path: Path) -> None:
    found = one(tmp_path, "a,GPQA,198,66.9,65.7")
    assert not found["count"]["whole"] and found["base_count"]["whole"]
    assert any("66.9 of 198 is no whole number" in text for text in found["text"])
    assert not any("65.7 of 198" in text for text in found["text"])


def test_digits_that_are_too_few_decide_nothing(tmp_path: Path) -> None:
    coarse = one(tmp_path, "a,x,1319,0.6,0.7")
    assert coarse["verdict"]["outcome"] == "cannot" and coarse["rounding"]["outcome"] == "shown"
    assert any("digits are too few" in text for text in coarse["text"])
    dropped = one(tmp_path, "a,x,1319,0.6,0.701")  # a spreadsheet wrote 0.600 as 0.6
    assert dropped["verdict"]["outcome"] == "shown" and dropped["rounding"] is None


def test_many_rows_hold_together(tmp_path: Path) -> None:
    alone = audit(tmp_path, f"{HEAD}a,x,100,56,50\n")
    many = audit(tmp_path, HEAD + "a,x,100,56,50\n" * 20)
    assert alone["claims"][0]["together"] == alone["claims"][0]["verdict"]
    assert alone["claims"][0]["verdict"]["outcome"] == "depends"
    assert {claim["together"]["outcome"] for claim in many["claims"]} == {"cannot"}
    assert (many["expected_by_chance"], many["level_together"]) == (1.0, pytest.approx(0.9975))
    assert many["least_questions_together"] > many["least_questions"] == 6


def test_means_need_their_spread(tmp_path: Path) -> None:
    head = "name,metric,n,score,base score,sd\n"
    found = one(tmp_path, "a,eval loss,300,2.10,2.12,0.4", head)
    # r = 1 - (0.02 / 1.96)^2 * 300 / (2 * 0.16)
    assert found["verdict"]["correlation"] == pytest.approx(1 - (0.02 / 1.959964) ** 2 * 300 / 0.32)
    assert found["kind"] == "mean" and found["questions"] is None
    assert one(tmp_path, "a,loss,300,2.10,2.50,0.4", head)["verdict"]["outcome"] == "shown"
    assert one(tmp_path, "a,loss,300,2.10,2.10,0.4", head)["verdict"]["outcome"] == "cannot"
    (problem,) = refused(tmp_path, f"{HEAD}a,val_loss,300,2.1,2.2\n")
    assert "`sd`" in problem.next and problem.where.endswith(":2 metric")
    for metric in ("MT-Bench", "BLEU", "eval_loss", "arena Elo"):
        (problem,) = refused(tmp_path, f"{HEAD}a,{metric},80,8.1,8.3\n")
        assert metric in problem.what and "`sd`" in problem.next
    (problem,) = refused(tmp_path, f"{head}a,wikitext ppl,300,6.24,6.89,1\n")
    assert "loss" in problem.next


# ---- tables as people write them


@pytest.mark.parametrize(
    "text",
    [
        "name,metric,n,score,base score\nA,GPQA,198,66.7,60.1\n",
        "\ufeffname,metric,n,score,base score\r\nA,GPQA,198,66.7,60.1\r\n\r\n",
        'Model,Benchmark,Questions,Accuracy,Baseline\nA,GPQA,"198",66.7 %,60.1%\n',
        "name;metric;n;score;base_score\nA;GPQA;198;66,7;60,1\n",
        "name\tmetric\tn\tacc\tbase\nA\tGPQA\t198\t0.667\t0.601\n",
        "| model | task | n | score | base |\n|---|---|---:|---|---|\n| A | GPQA | 198 | 66.7 ± 3.4 | 60.1 ± 3.5 |\n",
        "name,metric,n,Score (%),Base score (%)\nA,GPQA,198,66.7,60.1\n",
        "score,base score,n,metric,name,note\n0.667,.601,198,GPQA,A,\n",
    ],
)
def test_the_same_table_in_many_forms(tmp_path: Path, text: str) -> None:
    found = audit(tmp_path, text)["claims"][0]
    assert (found["name"], found["metric"], found["n"], found["line"]) == ("A", "GPQA", 198, 3 if "|--" in text else 2)
    assert (found["score"], found["base_score"]) == (0.667, 0.601)
    assert (found["count"]["nearest"], found["base_count"]["nearest"]) == (132, 119)


def test_a_table_of_a_spreadsheet_in_utf_16(tmp_path: Path) -> None:
    assert audit(tmp_path, "name\tn\tscore\tbase\nMüller\t1,319\t0.5\t0.4\n".encode("utf-16"))["claims"][0]["n"] == 1319


@pytest.mark.parametrize("n", ["1319", '"1,319"', "1 319", "1'319", "1\u202f319"])
def test_n_as_it_is_written(tmp_path: Path, n: str) -> None:
    assert one(tmp_path, f"a,x,{n},0.5,0.4")["n"] == 1319


def test_a_small_score_below_a_per_cent_sign_is_per_cent(tmp_path: Path) -> None:
    assert one(tmp_path, "a,x,1000,0.9,0.5", "name,metric,n,score (%),base %\n")["score"] == pytest.approx(0.009)


def test_columns_that_nothing_reads_are_named(tmp_path: Path) -> None:
    found = audit(tmp_path, "n,score,base,source,accuracy\n10,0.5,0.4,a paper,0.3\n")
    assert found["not_read"] == ["source", "accuracy"]  # a column that is called score is the score
    assert (found["claims"][0]["name"], found["claims"][0]["metric"]) == ("line 2", "score")


# ---- refusals


@pytest.mark.parametrize(
    ("text", "where", "named"),
    [
        ("", "table.csv", "empty"),
        ("\n \n", "table.csv", "empty"),
        (HEAD, "table.csv", "no rows"),
        (b"name,n,score,base\na,1,1,0\nM\xfcller,1,1,0\n", "table.csv:3", "UTF-8"),
        ("name,metric,n,score\n", "table.csv:1", "base score"),
        ("a,b\n1,2\n", "table.csv:1", "`a`, `b`"),
        ("n,acc,accuracy,base\n1,0,0,0\n", "table.csv:1", "`acc` and `accuracy`"),
        (f"{HEAD}a,x,1,319,0.5,0.4\n", "table.csv:2", '"1,319"'),
        (f"{HEAD}a,x,0,0.5,0.4\n", "table.csv:2 n", "says 0"),
        (f"{HEAD}a,x,,0.5,0.4\n", "table.csv:2 n", "says nothing"),
        (f"{HEAD}a,x,1.319,0.5,0.4\n", "table.csv:2 n", "1.319"),
        (f"{HEAD}a,x,10,0.5,\n", "table.csv:2", "base score"),
        (f"{HEAD}a,x,10,abc,0.4\n", "table.csv:2 score", "abc"),
        (f"{HEAD}a,x,10,nan,0.4\n", "table.csv:2 score", "nan"),
        (f"{HEAD}a,x,10,0.5,0.4\nb,x,10,0.5,0.4\nc,x,10,1.2,0.4\n", "table.csv:4 score", "1.2"),
        (f"{HEAD}a,x,10,50,40\nb,x,10,0.5,40\nc,x,10,60,40\n", "table.csv:3 score", "0.5"),
        (f"{HEAD}a,x,10,50 %,40\nb,x,10,60,40\nc,x,10,60,40\n", "table.csv:2 score", "% sign"),
        (f"{HEAD}a,x,10,101,40\n", "table.csv:2 score", "101"),
        (f"{HEAD}a,x,10,-0.1,0.4\n", "table.csv:2 score", "-0.1"),
        (f"{HEAD}a,x,10,0.9,40\n", "table.csv", "shares from 0 to 1"),
        (f'{HEAD}a,x,10,0.9,"40\n', "table.csv:2", "no CSV"),
        ("name,n,difference\na,198,1.5\n", "table.csv:2 difference", "1.5 %"),
        ("name,n,difference\na,198,150 %\n", "table.csv:2 difference", "150 %"),
        (f"{HEAD}a,x,10,1e-999999999,0.4\n", "table.csv:2 score", "no number"),
        (f"{HEAD}a,x,{'9' * 5000},0.5,0.4\n", "table.csv:2 n", "whole number"),
        (f"{HEAD}a,x,10,0.5,0.4\0\n", "table.csv:2 base score", "no number"),
        ("n,score,base,sd\n10,2.0,2.1,-1\n", "table.csv:2 sd", "-1"),
    ],
)
def test_what_no_table_of_claims_may_say(tmp_path: Path, text: str | bytes, where: str, named: str) -> None:
    (problem, *_) = refused(tmp_path, text)
    assert problem.where.endswith(where), problem
    assert named in str(problem)


def test_every_row_is_refused_at_once(tmp_path: Path) -> None:
    found = refused(tmp_path, f"{HEAD}a,x,0,0.5,0.4\nb,x,10,?,0.4\nc,x,10,0.5,\n")
    assert [problem.where.rsplit(":")[-1].split()[0] for problem in found] == ["2", "3", "4"]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, HEAD + ROW)
    assert main(["audit", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["claims"][0]["name"] == "mine"
    assert main(["audit", str(path)]) == 0
    assert "1,304 of 1,319 questions" in " ".join(capsys.readouterr().out.split())
    assert main(["audit", str(tmp_path / "nothing.csv")]) == 2
    assert main(["audit", str(tmp_path)]) == 2


@pytest.mark.parametrize("width", [80, 120])
def test_it_prints_in_a_terminal(tmp_path: Path, width: int) -> None:
    head = "name,metric,n,score,base score,sd,difference\n"
    rows = "a model with quite a long name,MMLU,14042,78.69,80.18,,\nb,loss,300,2.1,2.12,0.4,\nc,GPQA,198,,,,1.0 %\n"
    table = read_table(write(tmp_path, head + rows))
    console = Console(width=width)
    with console.capture() as captured:
        print_audited(audited(table.claims), table, console)
    text = captured.get()
    assert "…" not in text and max(map(len, text.splitlines())) <= width
    for piece in ("14,042", "[−1.71, −1.29]", "corr. ≥", "cannot be shown with 198", "for all", "Bonferroni"):
        assert piece in text
