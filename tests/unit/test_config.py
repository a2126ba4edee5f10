"""Guards: a mistake in the configuration is one error at the start that names the key and says
what would be right, and whatever is accepted means what the documentation says."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

from lamina.config import (
    Config,
    ConfigError,
    HostConfig,
    LoadConfig,
    format_size,
    load_config,
    table,
)
from lamina.config.memory import memory_bytes

ROOT = Path(__file__).parents[2]
DISK = {"path": "/var/lib/lamina", "capacity": "1GiB"}


def nested(key: str, value: object) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    assert isinstance(value, dict)
    return value


def problems(extra: dict[str, Any] | None, environ: dict[str, str] | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(extra, environ or {})
    assert str(caught.value).splitlines() == list(caught.value.problems)
    return list(caught.value.problems)


def from_file(tmp_path: Path, content: str | bytes) -> dict[str, str]:
    file = tmp_path / "lamina.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return {"LAMINA_CONFIG": str(file)}


class TestDefaults:
    def test_nothing_given_is_the_default(self) -> None:
        assert load_config(None, {}) == load_config({}, {"LAMINA_CONFIG": ""}) == Config()

    def test_defaults(self) -> None:
        assert Config().model_dump() == {
            "chunk_tokens": "auto",
            "identity": "auto",
            "load": {
                "mode": "auto",
                "when": "auto",
                "load_ahead": "auto",
                "min_tokens": "auto",
                "deadline": 30,
                "staging": 256 << 20,
            },
            "save": {"tokens": "all", "max_inflight": 1 << 30},
            "host": {"capacity": "auto"},
            "disk": None,
            "breaker": {"failures": 3, "pause": 10.0},
            "push": None,
            "observe": {"timeline": None, "decisions": None},
        }

    def test_defaults_pass_their_own_checks(self) -> None:
        assert load_config(Config().model_dump(), {}) == Config()

    def test_disk_defaults(self) -> None:
        disk = load_config({"disk": DISK}, {}).disk
        assert disk is not None
        assert disk.model_dump() == {
            "path": Path("/var/lib/lamina"),
            "capacity": 1 << 30,
            "direct": "auto",
            "max_inflight": 256 << 20,
            "fetch_ahead": 64 << 20,
        }

    def test_the_tree_is_immutable(self) -> None:
        with pytest.raises(ValueError, match="frozen"):
            Config().load.load_ahead = 3  # type: ignore[misc,unused-ignore]


class TestValues:
    @pytest.mark.parametrize("value", [0, -1, True, False, 1.0, 1.5, "1", "all", None, [], 1 << 31])
    def test_load_ahead_refuses(self, value: object) -> None:
        (problem,) = problems({"load": {"load_ahead": value}})
        assert problem.startswith("load.load_ahead: must be ")

    def test_the_message_says_what_would_be_right(self) -> None:
        assert problems({"load": {"load_ahead": 0}}) == [
            'load.load_ahead: must be "auto" or an integer of at least 1, got 0'
        ]

    def test_a_section_built_by_hand_is_checked_too(self) -> None:
        with pytest.raises(ValueError, match="load_ahead"):
            LoadConfig(load_ahead=0)

    @pytest.mark.parametrize("value", [1, 7, 100_000, "auto"])
    def test_load_ahead_accepts(self, value: object) -> None:
        assert load_config({"load": {"load_ahead": value}}, {}).load.load_ahead == value

    @pytest.mark.parametrize(
        ("text", "size"),
        [
            (1, 1),
            ("1024", 1024),
            ("10B", 10),
            ("3KiB", 3 << 10),
            ("512 MiB", 512 << 20),
            (" 4GiB ", 4 << 30),
            ("2TiB", 2 << 40),
        ],
    )
    def test_sizes(self, text: object, size: int) -> None:
        assert load_config({"load": {"staging": text}}, {}).load.staging == size
        assert load_config({"host": {"capacity": format_size(size)}}, {}).host.capacity == size

    @pytest.mark.parametrize(
        "value",
        [
            0,
            -1,
            1.5,
            True,
            None,
            "",
            "GiB",
            "-1GiB",
            "1.5GiB",
            "1 G i B",
            "٣GiB",
            1 << 63,
            "9" * 5000,
        ],
    )
    def test_sizes_refused(self, value: object) -> None:
        (problem,) = problems({"save": {"max_inflight": value}})
        assert problem.startswith("save.max_inflight: must be ")
        assert len(problem) < 200

    @pytest.mark.parametrize("value", ["4GB", "4gb", "4G", "4g", "4gib", "4Gi", "4 GB"])
    def test_units_that_are_not_binary_suggest_the_one_that_is(self, value: str) -> None:
        (problem,) = problems({"host": {"capacity": value}})
        assert '"4GiB"' in problem

    @pytest.mark.parametrize(
        "value", [0, -1, True, "30", float("nan"), float("inf"), 86_401, 10**400, None]
    )
    def test_seconds_refused(self, value: object) -> None:
        (problem,) = problems({"load": {"deadline": value}})
        assert problem.startswith("load.deadline: must be a number of seconds")

    @pytest.mark.parametrize("value", [1, 0.25, 86_400])
    def test_seconds(self, value: float) -> None:
        assert load_config({"load": {"deadline": value}}, {}).load.deadline == value

    @pytest.mark.parametrize("path", ["relative/path", "~/lamina", "", " ", "/a\0b", 3, None])
    def test_disk_path_must_be_absolute(self, path: object) -> None:
        assert problems({"disk": {**DISK, "path": path}}) == [
            f"disk.path: must be an absolute path, got {'null' if path is None else repr(path)}"
        ]

    @pytest.mark.parametrize("value", ["", "  ", 5, None])
    def test_identity_refused(self, value: object) -> None:
        assert len(problems({"identity": value})) == 1

    @pytest.mark.parametrize("value", ["yes", 1, None])
    def test_direct_refused(self, value: object) -> None:
        (problem,) = problems({"disk": {**DISK, "direct": value}})
        assert problem.startswith('disk.direct: must be "auto" or true or false')

    @pytest.mark.parametrize("value", [True, False, "auto"])
    def test_direct_accepted(self, value: object) -> None:
        disk = load_config({"disk": {**DISK, "direct": value}}, {}).disk
        assert disk is not None
        assert disk.direct is value or disk.direct == value

    def test_every_kind_of_text_and_path_is_kept(self) -> None:
        config = load_config({"identity": "llama@7", "observe": {"timeline": "t.json"}}, {})
        assert (config.identity, config.observe.timeline) == ("llama@7", Path("t.json"))


class TestShape:
    def test_all_problems_come_at_once(self) -> None:
        lines = problems(
            {"load": {"load_ahead": 0, "mode": "fast"}, "save": {"token": "all"}, "disk": {}}
        )
        assert [line.split(":")[0] for line in lines] == [
            "load.mode",
            "load.load_ahead",
            "save.token",
            "disk.path",
            "disk.capacity",
        ]

    @pytest.mark.parametrize(
        ("key", "suggestion"),
        [
            ("load.load_ahed", "load.load_ahead"),
            ("load_ahead", "load.load_ahead"),
            ("chunk_token", "chunk_tokens"),
            ("save.capacity", "host.capacity or disk.capacity"),
            ("disks.path", "disk?"),
        ],
    )
    def test_unknown_keys_suggest_the_nearest(self, key: str, suggestion: str) -> None:
        (problem,) = problems(nested(key, "/x"))
        name = "disks" if key == "disks.path" else key
        assert problem.startswith(f"{name}: unknown key; did you mean {suggestion}")

    def test_a_key_like_no_other_lists_them_all(self) -> None:
        (problem,) = problems({"zzzzzz": 1})
        assert "load.load_ahead" in problem
        assert "disk.capacity" in problem

    @pytest.mark.parametrize("key", [1, None, "a\nb", "k" * 9999])
    def test_strange_keys_stay_on_one_short_line(self, key: object) -> None:
        (problem,) = problems({"load": {key: 1}})
        assert problem.startswith("load.")
        assert len(problem) < 600

    @pytest.mark.parametrize("value", [None, 3, "auto", [1]])
    def test_a_section_must_be_a_section(self, value: object) -> None:
        (problem,) = problems({"load": value})
        assert problem.startswith("load: must be a section with the keys mode, when, load_ahead, ")

    def test_disk_null_is_no_disk(self) -> None:
        assert load_config({"disk": None}, {}).disk is None


class TestFile:
    def test_a_file_gives_the_same_tree(self, tmp_path: Path) -> None:
        text = """
            chunk_tokens: 128
            load: {mode: parked, deadline: 2.5}
            host:
              capacity: 16GiB
            disk: null
        """
        extra = {
            "chunk_tokens": 128,
            "load": {"mode": "parked", "deadline": 2.5},
            "host": {"capacity": "16GiB"},
        }
        assert load_config(None, from_file(tmp_path, text)) == load_config(extra, {})

    def test_both_places_are_one_tree(self, tmp_path: Path) -> None:
        environ = from_file(tmp_path, "disk: {path: /d}\nload: {load_ahead: 3}")
        config = load_config({"disk": {"capacity": 5}, "load": {"mode": "parked"}}, environ)
        assert config == load_config(
            {"disk": {"path": "/d", "capacity": 5}, "load": {"load_ahead": 3, "mode": "parked"}}, {}
        )

    def test_a_key_in_both_places_is_an_error_even_if_equal(self, tmp_path: Path) -> None:
        environ = from_file(tmp_path, "load: {load_ahead: 3, mode: auto}\nidentity: x")
        lines = problems({"load": {"load_ahead": 3}, "identity": "y"}, environ)
        assert sorted(line.split(":")[0] for line in lines) == ["identity", "load.load_ahead"]
        assert all("given both" in line for line in lines)

    def test_a_section_here_and_null_there_is_an_error(self, tmp_path: Path) -> None:
        (problem,) = problems({"disk": DISK}, from_file(tmp_path, "disk: null"))
        assert problem.startswith("disk: given both")

    @pytest.mark.parametrize("content", ["", "# only a comment\n", "---\n"])
    def test_an_empty_file_is_an_empty_tree(self, tmp_path: Path, content: str) -> None:
        assert load_config(None, from_file(tmp_path, content)) == Config()

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            ("- 1", "must hold a mapping"),
            ("text", "must hold a mapping"),
            ("load: {mode: auto, mode: parked}", "'?mode'? is given twice"),
            ("load: {}\nload: {}", "load is given twice"),
            ("load: [", "not valid YAML"),
            ("a: 1\n---\nb: 2", "not valid YAML"),
            ("load: !!python/object/apply:os.getcwd []", "not valid YAML"),
            ("[" * 100_000, "not valid YAML"),
            ("load: {deadline: 2024-99-99}", "not valid YAML"),
            ("load: !!bool perhaps", "not valid YAML"),
            (b"load: \xff\xfe\x00", "not valid YAML"),
            ("#" * ((1 << 20) + 1), "larger than 1MiB"),
        ],
    )
    def test_bad_files(self, tmp_path: Path, content: str | bytes, reason: str) -> None:
        environ = from_file(tmp_path, content)
        (problem,) = problems(None, environ)
        assert problem.startswith(f"LAMINA_CONFIG={environ['LAMINA_CONFIG']}: ")

        assert re.search(reason, problem)

    def test_a_bad_file_does_not_hide_what_is_wrong_elsewhere(self, tmp_path: Path) -> None:
        lines = problems({"load": {"load_ahead": 0}}, from_file(tmp_path, "- 1"))
        assert len(lines) == 2

    def test_missing_file(self, tmp_path: Path) -> None:
        (problem,) = problems(None, {"LAMINA_CONFIG": str(tmp_path / "no.yaml")})
        assert "cannot be read: No such file" in problem

    def test_what_is_no_regular_file_is_refused_without_blocking(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        for path in (tmp_path / "pipe", Path("/dev/zero")):
            assert problems(None, {"LAMINA_CONFIG": str(path)}) == [
                f"LAMINA_CONFIG={path}: is not a regular file"
            ]
        (problem,) = problems(None, {"LAMINA_CONFIG": str(tmp_path)})
        assert problem == f"LAMINA_CONFIG={tmp_path}: cannot be read: Is a directory"

    def test_no_mistake_keeps_a_file_open(self, tmp_path: Path) -> None:
        before = os.listdir("/proc/self/fd")
        for path in (tmp_path, Path("/dev/zero"), tmp_path / "missing"):
            problems(None, {"LAMINA_CONFIG": str(path)})
        assert os.listdir("/proc/self/fd") == before

    def test_aliases_cannot_blow_up_a_message(self, tmp_path: Path) -> None:
        lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
        lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
        lines += ["identity: *a11"]
        assert len("\n".join(problems(None, from_file(tmp_path, "\n".join(lines))))) < 7_000


class TestHostCapacity:
    def test_an_integer_is_obeyed(self) -> None:
        assert HostConfig(capacity=12345).capacity_bytes(ranks=4) == 12345

    def test_auto_is_a_share_of_a_quarter_of_memory_and_at_most_4_gib(self) -> None:
        assert HostConfig().capacity_bytes(ranks=1) == min(4 << 30, memory_bytes() // 4)
        assert HostConfig().capacity_bytes(ranks=1000) == memory_bytes() // 4 // 1000

    @pytest.mark.parametrize(
        ("cgroup", "file"),
        [
            ("0::/a/b", "sys/fs/cgroup/a/b/memory.max"),
            ("0::/a/b", "sys/fs/cgroup/a/memory.max"),
            ("0::/", "sys/fs/cgroup/memory.max"),
            ("0::/not/here", "sys/fs/cgroup/memory.max"),
            ("5:cpu:/x\n4:memory:/a", "sys/fs/cgroup/memory/a/memory.limit_in_bytes"),
        ],
    )
    def test_a_control_group_limits_memory(self, tmp_path: Path, cgroup: str, file: str) -> None:
        (tmp_path / "proc/self").mkdir(parents=True)
        (tmp_path / "proc/self/cgroup").write_text(cgroup + "\n")
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).write_text("1048576\n")
        assert memory_bytes(tmp_path) == 1048576

    def test_no_limit_is_the_machine(self, tmp_path: Path) -> None:
        machine = memory_bytes(tmp_path)
        (tmp_path / "proc/self").mkdir(parents=True)
        (tmp_path / "proc/self/cgroup").write_text("0::/\n")
        (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
        (tmp_path / "sys/fs/cgroup/memory.max").write_text("max\n")
        assert memory_bytes(tmp_path) == machine > 1 << 20


class TestTable:
    def test_every_leaf_has_a_line_with_a_meaning(self) -> None:
        rows = [line.strip("| ").split(" | ") for line in table().splitlines()[2:]]
        assert all(len(row) == 4 and all(row) for row in rows)
        assert {row[0].strip("`") for row in rows} >= {
            "chunk_tokens",
            "load.load_ahead",
            "host.capacity",
            "disk",
            "disk.max_inflight",
            "observe.timeline",
        }

    def test_defaults_are_what_the_tree_has(self) -> None:
        defaults = dict(line.strip("| ").split(" | ")[0:3:2] for line in table().splitlines()[2:])
        assert defaults["`load.staging`"] == '`"256MiB"`'
        assert defaults["`load.load_ahead`"] == '`"auto"`'
        assert defaults["`disk`"] == "`null`"
        assert defaults["`disk.path`"] == "required"

    def test_the_page_contains_it(self) -> None:
        assert table() in (ROOT / "docs/configuration.md").read_text(), (
            "docs/configuration.md is out of step; `lamina config` prints the table it should "
            "contain"
        )

    @pytest.mark.parametrize(
        ("size", "text"), [(1, "1"), (1000, "1000"), (1024, "1KiB"), (1536 << 20, "1536MiB")]
    )
    def test_format_size(self, size: int, text: str) -> None:
        assert format_size(size) == text
