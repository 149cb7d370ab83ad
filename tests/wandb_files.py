"""Reads back what W&B keeps offline: the records of a `.wandb` file, without W&B's own reader."""

import json
import struct
from pathlib import Path

_HEADER, _BLOCK = 7, 32768  # bytes
_FULL, _FIRST, _LAST = 1, 2, 4


def payloads(path):
    """The records of a file in LevelDB's log format: chunks that do not cross blocks, of which a record has one or more."""
    data, at, parts = Path(path).read_bytes(), _HEADER, []
    while at + _HEADER <= len(data):
        if _BLOCK - at % _BLOCK < _HEADER:  # too little of a block is filled with zeros
            at += _BLOCK - at % _BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        at += _HEADER
        parts = parts if kind not in (_FULL, _FIRST) else []
        parts.append(data[at : at + length])
        at += length
        if kind in (_FULL, _LAST):
            yield b"".join(parts)


class OfflineRun:
    """What one of W&B's folders holds: the run, its history, summary, configuration and files."""

    def __init__(self, place):
        from wandb.proto.wandb_internal_pb2 import Record

        (path,) = Path(place).glob("*.wandb")
        self.place, self.history, self.summary, self.config, self.artifacts, self.exit_code = place, [], {}, {}, [], None
        for payload in payloads(path):
            record = Record()
            record.ParseFromString(payload)
            kind = record.WhichOneof("record_type")
            if kind == "run":
                self.run = record.run
                self._add(self.config, record.run.config.update)
            elif kind == "config":
                self._add(self.config, record.config.update)
            elif kind == "summary":
                self._add(self.summary, record.summary.update)
            elif kind == "history":
                self.history.append(self._add({"_step": record.history.step.num}, record.history.item))
            elif kind == "artifact":
                self.artifacts.append(record.artifact)
            elif kind == "exit":
                self.exit_code = record.exit.exit_code

    @staticmethod
    def _add(values, items):
        for item in items:
            *outer, name = item.nested_key or [item.key]
            place = values
            for key in outer:
                place = place.setdefault(key, {})
            place[name] = json.loads(item.value_json)
        return values

    def file(self, value):
        """The file that a logged table, image or figure is kept in."""
        return self.place / "files" / value["path"]

    def table(self, value):
        """The rows of a logged table, as dictionaries."""
        found = json.loads(self.file(value).read_text())
        return [dict(zip(found["columns"], row, strict=True)) for row in found["data"]]


def offline_runs(folder):
    """The runs kept below a folder, by their id, one folder each; waits for W&B's process, which writes behind `finish`."""
    import wandb

    wandb.teardown()
    places = sorted(Path(folder).rglob("offline-run-*"))
    runs = [OfflineRun(place) for place in places if place.is_dir() and not place.is_symlink()]
    found = {run.run.run_id: run for run in runs}
    assert len(found) == len(runs), f"several folders of one run: {places}"
    return found
