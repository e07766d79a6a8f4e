# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""The table of model families says what the tests said."""

import json

from scripts.family_table import BEGIN, DOCS, END, RESULTS, outcomes, table

REPORT = """<testsuites><testsuite>
<testcase name="test_a_full_budget_gives_stock_vllms_tokens[Gemma 3, 8 KV heads]"/>
<testcase name="test_sparse_answers_are_the_same_in_company[Qwen3-MoE-sparq]"/>
<testcase name="test_sparse_answers_are_the_same_in_company[Qwen3-MoE-twilight]">
<failure/></testcase>
<testcase name="test_refused_by_engine_and_doctor_alike[BLOOM]"/>
<testcase name="test_the_doctor_sees_what_the_engine_serves[Llama]"/>
</testsuite></testsuites>"""


def test_what_a_report_says(tmp_path):
    report = tmp_path / "report.xml"
    report.write_text(REPORT)
    found = outcomes(report)
    assert found == {
        "Gemma 3, 8 KV heads": {"full budget": "passed"},
        "Qwen3-MoE": {"sparq": "passed", "twilight": "failed"},
        "BLOOM": {"refused": "passed"},
    }
    *_, first, second, last = table(found).splitlines()
    assert first == "| Gemma 3, 8 KV heads | yes | – | – | – |"
    assert second == "| Qwen3-MoE | – | yes | **no** | – |"
    assert last == "| BLOOM | refused | refused | refused | refused |"


def test_the_documentation_has_the_kept_results():
    results = json.loads(RESULTS.read_text())["families"]
    shown = DOCS.read_text().split(BEGIN)[1].split(END)[0]
    assert shown == table(results)
    assert len(results) >= 30
