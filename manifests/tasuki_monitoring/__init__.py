"""Dashboards and the page of metrics, written from typed Python; no part of the wheel.

`python -m tasuki_monitoring` writes `manifests/components/monitoring/dashboards/*.json` and
`docs/metrics.md`; a test fails when they are not what it would write.
"""
