"""What an LMCache controller is asked, answered in its shape; the bodies are those of its 0.5."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from control_rig import fleet, ids_of, until

import tierloom

GOLDEN = json.loads((Path(__file__).parent / "lmcache_golden.json").read_text())
IDS = ids_of(1)


def filled(body: dict[str, Any]) -> dict[str, Any]:
    return {name: IDS if value == "PROMPT" else value for name, value in body.items()}


def test_each_request_in_its_shape(tmp_path: Path) -> None:
    with fleet("redis", tmp_path, lmcache_routes=True) as rig:
        one, two = (rig.engine(name, door=True, reads=True) for name in ("one", "two"))
        rig.store(one, IDS)
        until(lambda: rig.tokens(tokens=IDS) == {"one": 192})
        until(lambda: all(i["door"] for i in rig.ask("/v1/instances").values()))
        events: dict[str, str] = {}
        for path, body, answer in GOLDEN:
            said = rig.ask(path, filled(body))
            events[path] = said["event_id"]
            if answer["event_id"] == "ID":
                answer = answer | {"event_id": said["event_id"]}
            for info in answer.get("worker_infos", ()):
                port = int(one.serves_at.rpartition(":")[2])
                info |= {"port": port, "peer_init_url": one.serves_at}
            assert said == answer, path
        for path, event in events.items():
            assert rig.ask("/check_finish", {"event_id": event}) == {"status": "done"}, path
        assert rig.ask("/check_finish", {"event_id": "one~none"}) == {"status": "lost"}
        assert tierloom.administer(one, "pins")["owners"]["lmcache"]["objects"] == 3
        assert (one.lookup(IDS), two.lookup(IDS)) == (192, 0)
        assert rig.raw("/clear", {"instance_id": "none"}).status_code == 422
        assert rig.raw("/lookup", {}).status_code == 422
        assert rig.raw("/health").json() == {"status": "alive"}  # by GET it is the door's


def test_without_the_option_they_are_not_there(rig: Any) -> None:
    for path, body, _ in GOLDEN:
        assert rig.raw(path, filled(body)).status_code in (404, 405)
