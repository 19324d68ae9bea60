"""`examples/kserve/inference-service.yaml`: its arguments, port and probe are those of `fastvlm-edge serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fastvlm_edge.commands import serve
from fastvlm_edge.server.settings import Settings

yaml = pytest.importorskip("yaml")
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(scope="module")
def predictor() -> Any:
    return yaml.safe_load((EXAMPLES / "kserve" / "inference-service.yaml").read_text(encoding="utf-8"))["spec"]["predictor"]


def test_the_container_starts_the_server(predictor: Any) -> None:
    (container,) = predictor["containers"]
    command, *arguments = container["args"]
    settings = serve.settings_of(serve.parser().parse_args(arguments))
    assert command == "serve" and 'ENTRYPOINT ["fastvlm-edge"]' in (EXAMPLES / "containers" / "Containerfile.x86-64").read_text()
    assert predictor["containerConcurrency"] == settings.slots + settings.queue
    assert settings.drain_seconds < predictor["terminationGracePeriodSeconds"]
    ports = {
        container["ports"][0]["containerPort"],
        container["readinessProbe"]["httpGet"]["port"],
        container["livenessProbe"]["tcpSocket"]["port"],
    }
    assert ports == {Settings().port}
