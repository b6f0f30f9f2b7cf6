"""Seed files of every form are read, and every fault is named with file, place and way out."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from storage.pools import read_rows
from tasks.novelty import NoveltyIndex
from tasks.seed import SeedConfig, SeedError, load_seeds, read_seeds

ALPACA = [
    {"instruction": "Übersetze «Haus» ins Französische.", "input": "", "output": "maison"},
    {"instruction": "Summarise.", "input": "A long text.", "output": "Short."},
]


def written(folder: Path, name: str, text: str | bytes) -> str:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def test_bundled_seeds_are_at_least_two_hundred_of_ten_categories() -> None:
    seeds = read_seeds("bundled")
    assert len(seeds.rows) >= 200
    assert len({row["category"] for row in seeds.rows}) == 10
    assert all((row["input"] is not None) == (row["category"] == "with-input") for row in seeds.rows)


def test_no_bundled_heldout_instruction_is_near_a_seed() -> None:
    index = NoveltyIndex(0.5)
    joined = lambda row: f"{row['instruction']}\n{row['input'] or ''}"  # noqa: E731
    index.add_many((str(number), joined(row)) for number, row in enumerate(read_seeds("bundled").rows))
    heldout = read_seeds("bundled", bundled="heldout.jsonl").rows
    assert len(heldout) == 80
    assert [row for row in heldout if index.nearest(joined(row))] == []


@pytest.mark.parametrize("form", ["json", "jsonl", "lines in .json", "csv", "parquet"])
def test_alpaca_rows_read_the_same_from_every_form(tmp_path: Path, form: str) -> None:
    if form == "json":
        path = written(tmp_path, "s.json", json.dumps(ALPACA, ensure_ascii=False))
    elif form in {"jsonl", "lines in .json"}:
        name = "s.jsonl" if form == "jsonl" else "s.json"
        path = written(tmp_path, name, "\n".join(json.dumps(row, ensure_ascii=False) for row in ALPACA))
    elif form == "csv":
        lines = [f'"{row["instruction"]}","{row["input"]}","{row["output"]}"' for row in ALPACA]
        path = written(tmp_path, "s.csv", "instruction,input,output\n" + "\n".join(lines))
    else:
        path = str(tmp_path / "s.parquet")
        pq.write_table(pa.Table.from_pylist(ALPACA), path)
    rows = read_seeds(path).rows
    assert [row["instruction"] for row in rows] == [row["instruction"] for row in ALPACA]
    assert [row["input"] for row in rows] == [None, "A long text."]
    assert [row["output"] for row in rows] == ["maison", "Short."]


def test_plain_lines_keep_order_and_unicode(tmp_path: Path) -> None:
    path = written(tmp_path, "s.txt", "Напиши стих.\n\n请解释重力。\u2028Kurz.\n")
    assert [row["instruction"] for row in read_seeds(path).rows] == ["Напиши стих.", "请解释重力。\u2028Kurz."]


def test_exact_duplicates_are_left_out_and_counted(tmp_path: Path) -> None:
    seeds = read_seeds(written(tmp_path, "s.txt", "One.\nTwo.\nOne.\nOne.\n"))
    assert [row["instruction"] for row in seeds.rows] == ["One.", "Two."]
    assert seeds.duplicates == 2


def test_messages_become_instruction_and_output(tmp_path: Path) -> None:
    said = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes."}]
    (row,) = read_seeds(written(tmp_path, "s.jsonl", json.dumps({"messages": said}))).rows
    assert (row["instruction"], row["output"]) == ("Hi?", "Yes.")


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Hi?", "instances": [{"input": None, "output": None}]},
        {"messages": [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": None, "tool_calls": []}]},
    ],
)
def test_what_is_null_within_a_row_is_as_if_it_were_not_there(tmp_path: Path, row: dict[str, Any]) -> None:
    (read,) = read_seeds(written(tmp_path, "s.jsonl", json.dumps(row))).rows
    assert (read["instruction"], read["input"], read["output"]) == ("Hi?", None, None)


def test_what_a_pool_has_no_column_for_is_counted(home: Path, tmp_path: Path) -> None:
    said = [{"role": role, "content": "Hm."} for role in ("system", "user", "assistant", "user")]
    rows = [
        {"instruction": "When did it start?", "context": "It started in 2004.", "category": "qa", "note": ""},
        {"instruction": "Which of them is blue?", "context": "The first."},
        {"messages": said},
        {"instruction": "Sort.", "instances": [{"input": "2 1", "output": "1 2"}, {"input": "4 3", "output": "3 4"}]},
    ]
    path = written(tmp_path, "s.jsonl", "\n".join(map(json.dumps, rows)))
    heldout = written(tmp_path, "heldout.jsonl", '{"instruction": "Why not?", "context": "", "hint": "No."}')
    assert load_seeds.fn(SeedConfig(path=path, heldout=heldout), "", "").passed_over == {
        "`context`": 2, "turns after the first": 1, "system messages": 1, "instances after the first": 1, "`hint`": 1
    }  # fmt: skip
    assert load_seeds.fn(SeedConfig(), "", "").passed_over == {}


def test_self_instruct_seed_tasks_are_read(shared_data: Path) -> None:
    rows = read_seeds(str(shared_data / "self_instruct_seed_175.jsonl")).rows
    assert len(rows) == 175
    assert sum(row["input"] is not None for row in rows) > 50
    assert all(row["output"] for row in rows)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("s.jsonl", '{"instruction": "a"}\n{"instruction": ', r"s\.jsonl, line 2, column \d+: not JSON"),
        ("s.json", '[{"instruction": "a"},\n oops]', r"s\.json, line 2, column 2: not JSON"),
        ("s.json", '{"data": []}', "expected a list of instructions, found an object"),
        ("s.json", '[\n{"instruction": "a"}\n]\n]', r"s\.json, line 4, column 1: not JSON"),
        ("s.jsonl", '{"instruction": "a"}\n{"id": ' + "1" * 5000 + "}", r"s\.jsonl, line 2: not JSON that can be read"),
        ("s.json", "[" * 100_000, r"s\.json: not JSON that can be read"),
        ("s.jsonl", '{"prompt": "a"}', r"line 1: no `instruction` \(found: prompt\)"),
        ("s.jsonl", '{"instruction": "a"}\n{"instruction": " "}', "line 2: `instruction` is empty"),
        ("s.jsonl", '{"instruction": 7}', "`instruction` must be a text, found a number"),
        ("s.csv", "question\nWhy?\n", r"line 2: no `instruction` \(found: question\)"),
        ("s.txt", b"good\nna\xefve\n", r"s\.txt, line 2: not UTF-8 \(byte 0xef\)"),
        ("s.txt", "Why?".encode("utf-16"), "iconv -f utf-16 -t utf-8"),
        ("s.txt", "Why?".encode("utf-16-le"), "line 1: a NUL is in it"),
        ("s.txt", "\n\n", "no instruction in it"),
        ("s.json", "", "no instruction in it"),
        ("s.docx", "x", "cannot tell its form"),
        ("s.parquet", "x", "not Parquet"),
    ],
)
def test_a_fault_is_named_with_file_and_place(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(SeedError, match=message):
        read_seeds(written(tmp_path, name, content))


def test_json_lines_by_the_name_json_are_read_however_many_they_are(tmp_path: Path) -> None:
    for count in (1, 2):
        text = "".join(json.dumps({"instruction": f"Ask {number}."}) + "\n" for number in range(count))
        assert len(read_seeds(written(tmp_path, "s.json", text)).rows) == count


def test_a_parquet_file_with_two_columns_of_one_name_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.parquet"
    pq.write_table(pa.table([["a"], ["b"]], names=["instruction"] * 2), path)
    with pytest.raises(SeedError, match=r"s\.parquet: the column instruction is there twice"):
        read_seeds(str(path))


def test_a_parquet_file_that_is_damaged_within_is_named(tmp_path: Path) -> None:
    path = tmp_path / "s.parquet"
    pq.write_table(pa.table({"instruction": [f"Explain {number**7}." for number in range(5000)]}), path)
    data = path.read_bytes()
    path.write_bytes(data[:1000] + bytes(3000) + data[4000:])
    with pytest.raises(SeedError, match=r"s\.parquet: not Parquet"):
        read_seeds(str(path))


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(SeedError, match="no such file"):
        read_seeds(str(tmp_path / "none.jsonl"))
    with pytest.raises(SeedError, match="is a folder"):
        read_seeds(str(tmp_path))
    with pytest.raises(SeedError, match="name of a file of instructions is empty"):
        read_seeds("")


def test_a_seed_near_a_heldout_instruction_enters_no_pool_and_is_counted(home: Path, tmp_path: Path) -> None:
    heldout = written(tmp_path, "heldout.txt", "Write a short poem about the first snow.\n")
    seeds = written(tmp_path, "seeds.txt", "Write a short poem about the last snow.\nWhy is the sky blue?\n")
    pools = load_seeds.fn(SeedConfig(path=seeds, heldout=heldout), "", "")
    assert [row["instruction"] for row in read_rows(pools.pool)] == ["Why is the sky blue?"]
    assert (pools.near_heldout, pools.duplicates, pools.beyond_max_rows) == (1, 0, 0)
    with pytest.raises(SeedError, match="every seed is near a held-out instruction"):
        load_seeds.fn(SeedConfig(path=heldout, heldout=heldout), "", "")


def test_every_seed_that_is_not_used_is_counted_by_its_reason(home: Path, tmp_path: Path) -> None:
    seeds = written(tmp_path, "seeds.txt", "Add 2 and 3.\nWhy is the sky blue?\nAdd 2 and 3.\nName a river.\nSing.\n")
    pools = load_seeds.fn(SeedConfig(path=seeds, max_rows=2), "", "")
    assert (pools.pool.rows, pools.duplicates, pools.near_heldout, pools.beyond_max_rows) == (2, 1, 0, 2)


def test_a_cell_of_a_csv_may_be_as_long_as_a_text_is(tmp_path: Path) -> None:
    text = "word " * 50_000
    (row,) = read_seeds(written(tmp_path, "s.csv", f"instruction,input\nSum up.,{text}\n")).rows
    assert row["input"] == text.strip()


def test_seeds_are_the_same_while_the_file_holds_the_same(tmp_path: Path) -> None:
    one, same, other = (written(tmp_path, f"{n}.txt", f"Why?\n{n // 2}\n") for n in range(3))
    digests = [SeedConfig(path=path, heldout="hf:some/set").digests() for path in (one, same, other)]
    assert digests[0] == digests[1] != digests[2]
    assert SeedConfig(path=one, heldout="hf:other/set").digests()[1] != digests[0][1]
    assert SeedConfig().digests() != SeedConfig().digests()[::-1]


def test_a_dataset_is_read_in_the_split_that_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="needs the extra hub")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    for split, asked in (("train", "Why?"), ("test", "How?")):
        written(tmp_path / "set", f"{split}.jsonl", json.dumps({"instruction": asked}) + "\n")
    for spec, asked in (("", "Why?"), (":test", "How?")):
        assert [row["instruction"] for row in read_seeds(f"hf:{tmp_path / 'set'}{spec}").rows] == [asked]
    with pytest.raises(SeedError, match="gone: the dataset cannot be had"):
        read_seeds(f"hf:{tmp_path / 'gone'}")


def test_a_line_separator_in_a_csv_field_ends_no_row(tmp_path: Path) -> None:
    path = written(tmp_path, "s.csv", 'instruction,input\nOne\u2028line,x\n"Two\nlines",y\n')
    assert [row["instruction"] for row in read_seeds(path).rows] == ["One\u2028line", "Two\nlines"]


def test_half_a_character_is_named(tmp_path: Path) -> None:
    path = written(tmp_path, "s.jsonl", '{"instruction": "Why \\ud83d?"}\n')
    with pytest.raises(SeedError, match="line 1: half of a character"):
        read_seeds(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("instruction,input\nWrite, with two lines, of cats\n", "line 2: more cells than columns"),
        ("instruction,instruction\na,b\n", "column instruction is there twice"),
        ('instruction,input\nHm,x\n"Why,x\nHow,y\n', "row after line 2: not CSV"),
    ],
)
def test_a_csv_that_would_lose_text_is_refused(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(SeedError, match=message):
        read_seeds(written(tmp_path, "s.csv", content))


def test_instances_of_another_kind_are_named(tmp_path: Path) -> None:
    with pytest.raises(SeedError, match="line 1: `instances` must be objects"):
        read_seeds(written(tmp_path, "s.jsonl", '{"instruction": "Why?", "instances": ["x"]}\n'))
