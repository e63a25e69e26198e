"""Debian's Prometheus reads a real relay: panels and rules have data under load, and each alert
about a relay fires while its fault lasts and clears after. A minute of the rules is a second here.

What is about the operator needs a cluster, and is left to the tests that have one.
"""

from collections.abc import Iterator

import dashboards
import outside_tools
import pytest
import tiny_models
from alert_faults import FAULTS, Clients, Fault
from fresh_seed import fresh_seed
from prometheus_server import Prometheus, of_relay
from relays import Relay, running

from tasuki_monitoring import rules

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

WAIT_SECONDS = 90.0
RULES = rules.spec(rules.Clock(minute=1))
NO_OPERATOR = {"TasukiOperatorAbsent"}
"""What fires here all the time, rightly."""


@pytest.fixture(scope="module")
def relay(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Relay]:
    """Two decode pods of few blocks; leases that end soon."""
    folder = tmp_path_factory.mktemp("monitored")
    model = tiny_models.make("granite_hybrid", folder, fresh_seed())
    relay = Relay(
        folder / "relay",
        model,
        transports=("tcp", "tcp"),
        engine={"num_blocks": 60, "max_num_seqs": 4},
        prefill_engine={"num_blocks": 2000, "num_state_slots": 200, "max_num_seqs": 32},
        gateway_flags=("--patience=1",),
        lease_seconds=2.0,
        drain_seconds=1.0,
    )
    with running(relay) as started:
        yield started


@pytest.fixture(scope="module")
def prometheus(relay: Relay, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    executable = outside_tools.debian("prometheus", "prometheus")
    folder = tmp_path_factory.mktemp("prometheus")
    with Prometheus(executable, folder, [of_relay(relay)], RULES) as server:
        yield server


def test_every_panel_variable_and_recording_rule_has_data_under_load(
    relay: Relay, prometheus: Prometheus
) -> None:
    boards = ("fleet", "deployment", "hand_over")
    queries = [
        *dashboards.panels(*boards, window="15s"),
        *dashboards.variables(*boards),
        *dashboards.recorded(RULES),
    ]
    with Clients(relay.url, 1):
        dashboards.wait_for_data(prometheus, queries, WAIT_SECONDS)
        assert prometheus.query("sum(tasuki_transfer_bytes_total)")[0] > 0
        every = [one for group in RULES["groups"] for one in group["rules"]]
        alerts = frozenset(one["alert"] for one in every if "alert" in one)
        prometheus.wait_clear(alerts - NO_OPERATOR, WAIT_SECONDS)


@pytest.mark.parametrize(("fault", "due"), FAULTS, ids=lambda one: getattr(one, "__name__", ""))
def test_alerts_fire_while_their_fault_lasts_and_clear_after(
    relay: Relay, prometheus: Prometheus, fault: Fault, due: frozenset[str]
) -> None:
    whole = [
        dashboards.Asked(role, f'tasuki_gateway_pods{{role="{role}"}} > 0')
        for role in ("prefill", "decode")
    ]
    with Clients(relay.url, 2):
        dashboards.wait_for_data(prometheus, whole, WAIT_SECONDS)  # what it never saw is not missed
        prometheus.wait_clear(due, WAIT_SECONDS)
        with fault(relay):
            prometheus.wait_fired(due, WAIT_SECONDS)
        prometheus.wait_clear(due, WAIT_SECONDS)
