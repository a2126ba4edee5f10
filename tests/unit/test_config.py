"""Guards: a mistake in the configuration is one error at the start that names the key and says
what would be right, and whatever is accepted means what the documentation says."""

from __future__ import annotations

import os
import pickle
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml

from lamina_kv.config import (
    Config,
    ConfigError,
    HostConfig,
    LoadConfig,
    PushConfig,
    example,
    format_size,
    json_schema,
    load_config,
    table,
)
from lamina_kv.config.memory import memory_bytes
from lamina_kv.config.table import rows
from lamina_kv.tiers import KINDS, Kind
from lamina_kv.tiers.config import SharedConfig, TierConfig
from lamina_kv.tiers.disk.config import DiskConfig
from lamina_kv.values import choice, integer

ROOT = Path(__file__).parents[2]
DISK = {"kind": "disk", "path": "/var/lib/lamina", "capacity": "1GiB"}


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
            "tiers": (),
            "breaker": {"failures": 3, "pause": 10.0},
            "push": None,
            "observe": {"timeline": None, "trace": None},
        }

    def test_defaults_pass_their_own_checks(self) -> None:
        assert load_config(Config().model_dump(), {}) == Config()

    def test_disk_defaults(self) -> None:
        (disk,) = load_config({"tiers": [DISK]}, {}).tiers
        assert disk.model_dump() == {
            "kind": "disk",
            "name": "disk",
            "max_inflight": 256 << 20,
            "keep": "all",
            "path": Path("/var/lib/lamina"),
            "capacity": 1 << 30,
            "direct": "auto",
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
        assert problems({"tiers": [{**DISK, "path": path}]}) == [
            "tiers[0].path (disk): must be an absolute path, got "
            f"{'null' if path is None else repr(path)}"
        ]

    @pytest.mark.parametrize("value", ["", "  ", 5, None])
    def test_identity_refused(self, value: object) -> None:
        assert len(problems({"identity": value})) == 1

    @pytest.mark.parametrize("value", ["yes", 1, None])
    def test_direct_refused(self, value: object) -> None:
        (problem,) = problems({"tiers": [{**DISK, "direct": value}]})
        assert problem.startswith('tiers[0].direct (disk): must be "auto" or true or false')

    @pytest.mark.parametrize("value", [True, False, "auto"])
    def test_direct_accepted(self, value: object) -> None:
        (disk,) = load_config({"tiers": [{**DISK, "direct": value}]}, {}).tiers
        assert isinstance(disk, DiskConfig)
        assert disk.direct is value or disk.direct == value

    def test_every_kind_of_text_and_path_is_kept(self) -> None:
        config = load_config({"identity": "llama@7", "observe": {"timeline": "t.json"}}, {})
        assert (config.identity, config.observe.timeline) == ("llama@7", Path("t.json"))


class Shelf(TierConfig):
    kind: Annotated[Literal["shelf"], choice("shelf")] = "shelf"
    boards: Annotated[int, integer(1)] = 3


class TestTiers:
    def test_they_keep_their_order_and_have_names(self) -> None:
        tiers = load_config({"tiers": [DISK, {**DISK, "name": "spare"}]}, {}).tiers
        assert [tier.name for tier in tiers] == ["disk", "spare"]
        assert tiers[1].key("path") == "tiers.spare.path"

    def test_a_tuple_or_what_was_built_by_hand_will_do(self) -> None:
        disk = DiskConfig(path=Path("/var/lib/lamina"), capacity=1 << 30)
        assert Config(tiers=(disk,)) == load_config({"tiers": (DISK,)}, {})
        with pytest.raises(ValueError, match="capacity"):
            DiskConfig(path=Path("/d"), capacity=0)

    def test_it_survives_pickling(self) -> None:
        config = load_config({"tiers": [DISK]}, {})
        assert pickle.loads(pickle.dumps(config)) == config

    def test_all_mistakes_come_at_once_by_number_and_name(self) -> None:
        lines = problems(
            {
                "tiers": [
                    {**DISK, "capacity": "4GB"},
                    {**DISK, "name": "spare", "capcity": 1},
                    {"kind": "disk", "name": "a b", "capacity": 1},
                ]
            }
        )
        assert [line.split(": ")[0] for line in lines] == [
            "tiers[0].capacity (disk)",
            "tiers[1].capcity (spare)",
            "tiers[2].name (a b)",
            "tiers[2].path (a b)",
        ]
        assert lines[1].endswith("did you mean tiers[].capacity?")

    @pytest.mark.parametrize("kind", ["dsk", "", None, 3, []])
    def test_an_unknown_kind_lists_those_there_are(self, kind: object) -> None:
        (problem,) = problems({"tiers": [DISK, {**DISK, "kind": kind}]})
        assert problem.startswith("tiers[1].kind")
        assert f"must be {choice(*KINDS).words}, got" in problem

    def test_a_kind_is_required(self) -> None:
        assert problems({"tiers": [{"path": "/d"}]}) == ["tiers[0].kind: is required"]

    def test_two_may_not_have_the_same_name(self) -> None:
        (problem,) = problems({"tiers": [DISK, {**DISK, "name": "a"}, {**DISK, "path": "/e"}]})
        assert problem.startswith('tiers: entries 0 and 2 are both called "disk"; ')

    @pytest.mark.parametrize(
        "name",
        ["host", "push", "engine", "computed", "", "-a", "a b", "a\n", "x" * 41, "ä", 3, None],
    )
    def test_names_refused(self, name: object) -> None:
        (problem,) = problems({"tiers": [{**DISK, "name": name}]})
        assert problem.startswith("tiers[0].name")

    @pytest.mark.parametrize("value", [None, "disk", 3, DISK, {0: DISK}])
    def test_it_must_be_a_list(self, value: object) -> None:
        (problem,) = problems({"tiers": value})
        assert problem.startswith('tiers: must be a list such as [{"kind": "disk", ')

    @pytest.mark.parametrize("value", [None, "disk", [DISK]])
    def test_an_entry_must_be_a_section(self, value: object) -> None:
        (problem,) = problems({"tiers": [value]})
        assert problem.startswith("tiers[0]: must be a section")

    @pytest.mark.parametrize(
        ("old", "new"),
        [
            (
                {"path": "/d", "capacity": "5GiB", "direct": False},
                '[{"kind": "disk", "path": "/d", "capacity": "5GiB", "direct": false}]',
            ),
            ({"capacity": 5}, '[{"kind": "disk", "capacity": 5}]'),
            ("/d", '[{"kind": "disk"}]'),
        ],
    )
    def test_the_former_section_is_shown_in_its_new_form(self, old: object, new: str) -> None:
        assert problems({"disk": old}) == [
            f'disk: is an entry of the list `tiers` now: "tiers": {new}'
        ]

    def test_fetch_ahead_is_gone(self) -> None:
        (problem,) = problems({"disk": {"path": "/d", "fetch_ahead": None}})
        assert '"tiers": [{"kind": "disk", "path": "/d"}]; `fetch_ahead` does not exist' in problem
        (problem,) = problems({"tiers": [{**DISK, "fetch_ahead": 1}]})
        assert problem.startswith("tiers[0].fetch_ahead (disk): does not exist any more; `max_infl")

    def test_decisions_are_in_the_log(self) -> None:
        (problem,) = problems({"observe": {"decisions": "/d"}})
        assert problem.startswith("observe.decisions: does not exist any more; the logger `lamina")

    def test_no_disk_in_the_former_words(self) -> None:
        (problem,) = problems({"disk": None})
        assert problem.startswith("disk: does not exist any more; leave it out")

    def test_a_kind_is_known_once_it_is_registered(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(KINDS, "shelf", Kind(Shelf, "no.such:thing"))
        tiers = load_config({"tiers": [DISK, {"kind": "shelf", "boards": 5}]}, {}).tiers
        assert tiers[1] == Shelf(boards=5)
        assert problems({"tiers": [{"kind": "shelf", "boards": 0}, {"kind": "?"}]}) == [
            "tiers[0].boards (shelf): must be an integer of at least 1, got 0",
            f"tiers[1].kind (?): must be {choice(*KINDS).words}, got '?'",
        ]


class TestShape:
    def test_all_problems_come_at_once(self) -> None:
        lines = problems(
            {"load": {"load_ahead": 0, "mode": "fast"}, "save": {"token": "all"}}
            | {"tiers": [{"kind": "disk"}]}
        )
        assert [line.split(":")[0] for line in lines] == [
            "load.mode",
            "load.load_ahead",
            "save.token",
            "tiers[0].path (disk)",
            "tiers[0].capacity (disk)",
        ]

    @pytest.mark.parametrize(
        ("key", "suggestion"),
        [
            ("load.load_ahed", "load.load_ahead"),
            ("load_ahead", "load.load_ahead"),
            ("chunk_token", "chunk_tokens"),
            ("save.capacity", "host.capacity or tiers[].capacity"),
            ("tier", "tiers?"),
        ],
    )
    def test_unknown_keys_suggest_the_nearest(self, key: str, suggestion: str) -> None:
        (problem,) = problems(nested(key, "/x"))
        assert problem.startswith(f"{key}: unknown key; did you mean {suggestion}")

    def test_a_key_like_no_other_lists_them_all(self) -> None:
        (problem,) = problems({"zzzzzz": 1})
        assert "load.load_ahead" in problem
        assert "host.capacity, tiers, breaker.failures" in problem
        (problem,) = problems({"tiers": [{**DISK, "z" * 30: 1}]})
        assert "tiers[].capacity" in problem
        assert "load.load_ahead" not in problem

    @pytest.mark.parametrize("key", [1, None, "a\nb", "k" * 9999])
    def test_strange_keys_stay_on_one_short_line(self, key: object) -> None:
        (problem,) = problems({"load": {key: 1}})
        assert problem.startswith("load.")
        assert len(problem) < 600

    @pytest.mark.parametrize("value", [None, 3, "auto", [1]])
    def test_a_section_must_be_a_section(self, value: object) -> None:
        (problem,) = problems({"load": value})
        assert problem.startswith("load: must be a section with the keys mode, when, load_ahead, ")


class TestFile:
    def test_a_file_gives_the_same_tree(self, tmp_path: Path) -> None:
        text = """
            chunk_tokens: 128
            load: {mode: parked, deadline: 2.5}
            host:
              capacity: 16GiB
            tiers:
              - {kind: disk, path: /var/lib/lamina, capacity: 1GiB}
        """
        extra = {
            "chunk_tokens": 128,
            "load": {"mode": "parked", "deadline": 2.5},
            "host": {"capacity": "16GiB"},
            "tiers": [DISK],
        }
        assert load_config(None, from_file(tmp_path, text)) == load_config(extra, {})

    def test_both_places_are_one_tree(self, tmp_path: Path) -> None:
        environ = from_file(
            tmp_path, "load: {load_ahead: 3}\ntiers: [{kind: disk, path: /d, capacity: 5}]"
        )
        config = load_config({"load": {"mode": "parked"}, "save": {"tokens": "prompt"}}, environ)
        assert config == load_config(
            {
                "load": {"load_ahead": 3, "mode": "parked"},
                "save": {"tokens": "prompt"},
                "tiers": [{"kind": "disk", "path": "/d", "capacity": 5}],
            },
            {},
        )

    def test_a_key_in_both_places_is_an_error_even_if_equal(self, tmp_path: Path) -> None:
        environ = from_file(tmp_path, "load: {load_ahead: 3, mode: auto}\nidentity: x")
        lines = problems({"load": {"load_ahead": 3}, "identity": "y"}, environ)
        assert sorted(line.split(":")[0] for line in lines) == ["identity", "load.load_ahead"]
        assert all("given both" in line for line in lines)

    def test_a_section_here_and_null_there_is_an_error(self, tmp_path: Path) -> None:
        (problem,) = problems({"push": {}}, from_file(tmp_path, "push: null"))
        assert problem.startswith("push: given both")

    def test_the_tiers_stand_in_one_place(self, tmp_path: Path) -> None:
        (problem,) = problems({"tiers": [DISK]}, from_file(tmp_path, "tiers: []"))
        assert problem.startswith("tiers: given both")

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

    @pytest.mark.parametrize(
        "push",
        [
            '"s3cret"x',
            "'s3cret",
            "@s3cret",
            "s3cret: s3cret",
            "[s3cret]",
            "{s3cret: 1}",
            "s3cret\n x",
        ],
    )
    def test_a_secret_is_in_no_message(self, tmp_path: Path, push: str) -> None:
        lines = problems(None, from_file(tmp_path, f"push:\n  token: {push}\n  deadline: no\n"))
        assert "push.deadline" in "".join(lines) or "line" in "".join(lines)
        assert "s3cret" not in "".join(lines)

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


class TestPush:
    @pytest.mark.parametrize("token", [1234567, ["1234567"], {"1234567": 1}, 1234567.0, True, ""])
    def test_a_secret_is_not_quoted(self, token: object) -> None:
        (problem,) = problems({"push": {"token": token}})
        assert problem.startswith("push.token: must be null or text that is not empty")
        assert "1234567" not in problem

    def test_a_secret_is_not_shown(self) -> None:
        config = load_config({"push": {"token": "s3cret"}}, {})
        assert "s3cret" not in f"{config} {config!r}"

    @pytest.mark.parametrize(
        ("deadline", "silence", "least"), [(60, 5, 75), (600, 5, 615), (60, 60, 195), (1, 1, 18)]
    )
    def test_a_quarantine_outlasts_what_may_still_be_written(
        self, deadline: float, silence: float, least: float
    ) -> None:
        push = {"deadline": deadline, "silence": silence}
        (problem,) = problems({"push": {**push, "quarantine": least - 0.5}})
        for words in ("push.quarantine", "push.deadline", "push.silence", f"at least {least} s"):
            assert words in problem
        load_config({"push": {**push, "quarantine": least}}, {})

    def test_its_default_does(self) -> None:
        load_config({"push": {}}, {})


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
            "tiers",
            "tiers[].max_inflight",
            "tiers[].path` (disk)",
            "observe.timeline",
        }

    def test_defaults_are_what_the_tree_has(self) -> None:
        defaults = dict(line.strip("| ").split(" | ")[0:3:2] for line in table().splitlines()[2:])
        assert defaults["`load.staging`"] == '`"256MiB"`'
        assert defaults["`load.load_ahead`"] == '`"auto"`'
        assert defaults["`tiers`"] == "`[]`"
        assert defaults["`tiers[].path` (disk)"] == "required"
        assert defaults["`push`"] == "`null`"

    def test_keys_of_several_kinds_stand_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for kind in [*KINDS][:0:-1]:  # backwards, so that their order is as it was afterwards
            monkeypatch.delitem(KINDS, kind)
        for kind in ("shelf", "board"):
            monkeypatch.setitem(KINDS, kind, Kind(SharedConfig, "no.such:thing"))
        defaults = dict(line.strip("| ").split(" | ")[0:3:2] for line in table().splitlines()[2:])
        assert defaults["`tiers[].keep`"] == '`"all"`'
        assert defaults["`tiers[].timeout` (shelf, board)"] == "`2.0`"
        assert not [key for key in defaults if key.startswith("`tiers[].name` (")]

    def test_the_page_contains_it(self) -> None:
        assert table() in (ROOT / "docs/configuration.md").read_text(), (
            "docs/configuration.md is out of step; `lamina-kv config` prints the table it should "
            "contain"
        )

    @pytest.mark.parametrize(
        ("size", "text"), [(1, "1"), (1000, "1000"), (1024, "1KiB"), (1536 << 20, "1536MiB")]
    )
    def test_format_size(self, size: int, text: str) -> None:
        assert format_size(size) == text


class TestExample:
    """What ``lamina-kv config --example`` prints."""

    def test_as_it_stands_it_is_the_default(self, tmp_path: Path) -> None:
        assert load_config({}, from_file(tmp_path, example())) == Config()

    def test_without_its_marks_it_has_every_key_with_its_default(self, tmp_path: Path) -> None:
        text = re.sub(r"^( *)#(?! )", r"\1", example(), flags=re.MULTILINE)
        whole = load_config({}, from_file(tmp_path, text))
        assert whole.model_dump(exclude={"tiers", "push"}) == Config().model_dump(
            exclude={"tiers", "push"}
        )
        assert whole.push == PushConfig()
        assert [tier.kind for tier in whole.tiers] == [*KINDS]
        for tier in whole.tiers:
            fields = {n: f for n, f in type(tier).model_fields.items() if not f.is_required()}
            given = {name: getattr(tier, name) for name in fields}
            defaults = {name: field.default for name, field in fields.items()}
            assert given == defaults | {"kind": tier.kind, "name": tier.kind}
        keys = {row.name.rpartition(".")[2] for row in rows()}
        assert keys == {*re.findall(r"^ *(?:- )?(\w+):", text, re.MULTILINE)} - SECTIONS

    def test_every_line_is_short_and_every_key_is_explained(self) -> None:
        lines = example().splitlines()
        assert max(map(len, lines)) <= 100
        for row in rows():
            if row.name != "tiers[].kind":
                assert " ".join(row.meaning.split()[:4]) in example()


class TestSchema:
    """What ``lamina-kv config --json-schema`` prints."""

    def errors(self, text: str) -> list[str]:
        jsonschema = pytest.importorskip("jsonschema")
        checker = jsonschema.Draft202012Validator(json_schema())
        checker.check_schema(json_schema())
        return [error.message for error in checker.iter_errors(yaml.safe_load(text))]

    def test_it_accepts_every_key(self) -> None:
        assert not self.errors(re.sub(r"^( *)#(?! )", r"\1", example(), flags=re.MULTILINE))

    @pytest.mark.parametrize(
        "text",
        [
            "hots: {}",
            "load: {lod_ahead: 2}",
            "load: {load_ahead: 0}",
            "load: {when: sometimes}",
            "host: {capacity: big}",
            "host: {capacity: 0}",
            "tiers: [{path: /store, capacity: 1GiB}]",
            "tiers: [{kind: disk, path: /store}]",
            "tiers: [{kind: disk, path: store, capacity: 1GiB}]",
            "tiers: [{kind: tape}]",
            "breaker: {pause: 0}",
            "push: {max_parked: 2}",
        ],
    )
    def test_it_refuses_what_the_tree_refuses(self, text: str) -> None:
        assert self.errors(text)
        assert problems(yaml.safe_load(text))

    @pytest.mark.parametrize(
        "text",
        [
            "load: {load_ahead: 4, min_tokens: auto}",
            "host: {capacity: 1024}",
            "tiers: [{kind: disk, path: /store, capacity: 1GiB}, {kind: s3, url: 's3://b'}]",
            "push: null",
            "push: {}",
            "observe: {trace: t.jsonl}",
        ],
    )
    def test_it_accepts_what_the_tree_accepts(self, text: str) -> None:
        assert not self.errors(text)
        load_config(yaml.safe_load(text), {})


SECTIONS = {"load", "save", "host", "breaker", "observe"}
