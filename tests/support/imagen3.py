"""The win rates and Elo that Imagen 3's report prints (arXiv 2408.07009v3): figures 2 to 5, six models of which each met
all others; figure 14, where models added later met the four better and the four worse; and how two measures and people
order pairs of models, figure 11."""

from __future__ import annotations

from itertools import combinations
from typing import NamedTuple

import numpy as np

RATINGS = 2500  # of each pair, section 3.1


class Printed(NamedTuple):
    """A figure: its models from the best to the worst by its Elo, and how often that of the row was preferred to that of the
    column, in percent (. of two that did not meet)."""

    models: str
    elo: str
    rates: str

    def wins(self) -> np.ndarray:
        """float [M, M]: of as many ratings as the report has of each pair."""
        rows = [[np.nan if word == "." else float(word) for word in line.split()] for line in self.rates.split("\n")]
        return RATINGS / 100 * np.nan_to_num(np.array(rows))

    def strengths(self) -> np.ndarray:
        """Printed Elo, float [M]."""
        return np.array([float(word) for word in self.elo.split()])

    def names(self) -> list[str]:
        return self.models.split()


FULL = {
    "overall preference, GenAI-Bench": Printed(
        "Imagen-3 SD-3 DALL·E-3 MJ-v6 Imagen-2 SDXL-1",
        "1098 1047 1028 1027 941 860",
        """. 57.8 60.0 58.0 69.9 77.7
42.2 . 53.2 53.7 62.6 72.8
40.0 46.8 . 50.1 63.3 68.1
42.0 46.3 49.9 . 59.1 69.5
30.1 37.4 36.7 40.9 . 58.2
22.3 27.2 31.9 30.5 41.8 .""",
    ),
    "overall preference, DrawBench": Printed(
        "Imagen-3 SD-3 MJ-v6 DALL·E-3 Imagen-2 SDXL-1",
        "1068 1053 1027 999 929 923",
        """. 50.9 56.2 60.0 68.0 69.6
49.1 . 50.5 58.6 63.3 69.8
43.8 49.5 . 53.1 62.9 63.2
40.0 41.4 46.9 . 60.5 58.9
32.0 36.7 37.1 39.5 . 50.3
30.4 30.2 36.8 41.1 49.7 .""",
    ),
    "overall preference, DALL·E 3 Eval": Printed(
        "Imagen-3 MJ-v6 SD-3 DALL·E-3 Imagen-2 SDXL-1",
        "1079 1068 1062 1058 875 857",
        """. 50.5 52.0 53.7 71.0 77.7
49.5 . 51.6 51.4 71.4 67.3
48.0 48.4 . 52.5 71.6 73.2
46.3 48.6 47.5 . 74.8 68.2
29.0 28.6 28.4 25.2 . 53.1
22.3 32.7 26.8 31.8 46.9 .""",
    ),
    "alignment, GenAI-Bench": Printed(
        "Imagen-3 SD-3 DALL·E-3 MJ-v6 Imagen-2 SDXL-1",
        "1083 1047 1028 1019 950 873",
        """. 55.1 59.4 59.1 65.4 76.1
44.9 . 51.0 54.9 63.6 72.5
40.6 49.0 . 51.2 59.8 70.2
40.9 45.1 48.8 . 61.7 68.0
34.6 36.4 40.2 38.3 . 59.0
23.9 27.5 29.8 32.0 41.0 .""",
    ),
    "alignment, DrawBench": Printed(
        "Imagen-3 SD-3 DALL·E-3 MJ-v6 Imagen-2 SDXL-1",
        "1064 1047 1013 1011 934 931",
        """. 52.6 56.0 58.3 66.5 65.1
47.4 . 55.2 52.8 66.1 67.0
44.0 44.8 . 49.9 58.5 61.8
41.7 47.2 50.1 . 59.7 60.8
33.5 33.9 41.5 40.3 . 48.8
34.9 33.0 38.2 39.2 51.2 .""",
    ),
    "alignment, DALL·E 3 Eval": Printed(
        "Imagen-3 DALL·E-3 SD-3 MJ-v6 Imagen-2 SDXL-1",
        "1078 1077 1069 1052 876 848",
        """. 50.2 52.3 53.0 71.8 77.7
49.8 . 50.1 51.3 75.0 74.4
47.7 49.9 . 52.1 73.0 77.0
47.0 48.7 47.9 . 68.5 69.9
28.2 25.0 27.0 31.5 . 52.3
22.3 25.6 23.0 30.1 47.7 .""",
    ),
    "visual appeal, GenAI-Bench": Printed(
        "MJ-v6 Imagen-3 SD-3 DALL·E-3 Imagen-2 SDXL-1",
        "1101 1095 1072 969 943 821",
        """. 51.6 54.0 65.9 64.4 78.4
48.4 . 51.5 61.9 67.3 76.5
46.0 48.5 . 61.2 62.2 71.8
34.1 38.1 38.8 . 54.1 71.4
35.6 32.7 37.8 45.9 . 60.5
21.6 23.5 28.2 28.6 39.5 .""",
    ),
    "visual appeal, DrawBench": Printed(
        "MJ-v6 Imagen-3 SD-3 Imagen-2 SDXL-1 DALL·E-3",
        "1075 1063 1029 994 934 906",
        """. 53.9 54.8 59.6 64.7 71.2
46.1 . 57.1 60.8 66.2 67.8
45.2 42.9 . 52.9 63.8 65.8
40.4 39.2 47.1 . 58.3 61.4
35.3 33.8 36.2 41.7 . 54.0
28.7 32.2 34.2 38.6 46.0 .""",
    ),
    "visual appeal, DALL·E 3 Eval": Printed(
        "MJ-v6 Imagen-3 SD-3 DALL·E-3 SDXL-1 Imagen-2",
        "1095 1047 1024 1001 922 910",
        """. 58.1 59.1 61.1 69.1 65.9
41.9 . 51.8 57.7 64.2 63.9
40.9 48.2 . 51.5 64.7 64.0
38.9 42.3 48.5 . 56.6 68.0
30.9 35.8 35.3 43.4 . 48.9
34.1 36.1 36.0 32.0 51.1 .""",
    ),
    "detailed alignment, DOCCI": Printed(
        "Imagen-3 MJ-v6 SD-3 Imagen-2 DALL·E-3 SDXL-1",
        "1193 1079 1051 971 913 793",
        """. 63.0 70.2 74.2 79.5 88.3
37.0 . 53.0 62.1 71.3 81.7
29.8 47.0 . 61.1 68.4 80.9
25.8 37.9 38.9 . 59.4 67.9
20.5 28.7 31.6 40.6 . 67.3
11.7 18.3 19.1 32.1 32.7 .""",
    ),
}
ADDED = {
    "overall preference": Printed(
        "Imagen-3-002 RecraftV3 IdeogramV2 Imagen-3-001 Flux1.1p SD-3.5-L DALL·E-3 MJ-v6 NovaCanvas Imagen-2 SDXL-1",
        "1115 1078 1059 1053 1043 1001 997 982 964 889 817",
        """. 55.2 58.8 58.8 59.5 . . . . . .
44.8 . 50.8 52.9 56.1 61.8 . . . . .
41.2 49.2 . 50.2 51.0 59.2 59.4 . . . .
41.2 47.1 49.8 . 50.6 56.2 57.3 59.0 . . .
40.5 43.9 49.0 49.4 . 54.4 55.8 59.8 60.3 . .
. 38.2 40.8 43.8 45.6 . 50.4 54.1 54.1 65.4 .
. . 40.6 42.7 44.2 49.6 . 50.1 58.6 63.3 68.1
. . . 41.0 40.2 45.9 49.9 . 52.2 59.1 69.5
. . . . 39.7 45.9 41.4 47.8 . 62.2 68.9
. . . . . 34.6 36.7 40.9 37.8 . 58.2
. . . . . . 31.9 30.5 31.1 41.8 .""",
    ),
    "visual quality": Printed(
        "Imagen-3-002 RecraftV3 IdeogramV2 Imagen-3-001 MJ-v6 Flux1.1p SD-3.5-L DALL·E-3 NovaCanvas Imagen-2 SDXL-1",
        "1135 1112 1104 1104 1066 1063 1033 961 897 827 697",
        """. 52.7 53.8 53.2 60.5 . . . . . .
47.3 . 49.1 49.1 57.6 59.0 . . . . .
46.2 50.9 . 51.5 49.6 52.2 60.7 . . . .
46.8 50.9 48.5 . 48.7 56.4 59.4 66.5 . . .
39.5 42.4 50.4 51.3 . 47.6 50.7 65.9 72.5 . .
. 41.0 47.8 43.6 52.4 . 50.8 64.0 63.6 67.8 .
. . 39.3 40.6 49.3 49.2 . 55.0 63.6 70.4 80.1
. . . 33.5 34.1 36.0 45.0 . 64.7 54.1 71.4
. . . . 27.5 36.4 36.4 35.3 . 62.7 74.1
. . . . . 32.2 29.6 45.9 37.3 . 60.5
. . . . . . 19.9 28.6 25.9 39.5 .""",
    ),
    "alignment": Printed(
        "Imagen-3-002 RecraftV3 IdeogramV2 Imagen-3-001 Flux1.1p SD-3.5-L DALL·E-3 MJ-v6 NovaCanvas Imagen-2 SDXL-1",
        "1106 1061 1045 1042 1037 1004 1002 982 971 906 845",
        """. 56.8 58.4 57.9 60.5 . . . . . .
43.2 . 51.4 52.2 54.7 58.8 . . . . .
41.6 48.6 . 50.7 49.1 56.5 56.7 . . . .
42.1 47.8 49.3 . 51.1 55.5 56.1 55.5 . . .
39.5 45.3 50.9 48.9 . 54.8 55.9 57.9 58.5 . .
. 41.2 43.5 44.5 45.2 . 48.1 55.3 55.4 64.2 .
. . 43.3 43.9 44.1 51.9 . 51.2 56.9 59.8 70.2
. . . 44.5 42.1 44.7 48.8 . 49.7 61.7 68.0
. . . . 41.5 44.6 43.1 50.3 . 59.9 66.5
. . . . . 35.8 40.2 38.3 40.1 . 59.0
. . . . . . 29.8 32.0 33.5 41.0 .""",
    ),
}

JUDGED = ["Imagen-3", "SD-3", "MJ-v6", "DALL·E-3", "Imagen-2", "SDXL-1"]
ORDERS = {  # whether the first of a pair is better, worse or neither: pairs of JUDGED, row by row of the upper triangle
    "GenAI-Bench": {"Gecko": "=>>>> >>>> >>> >> >", "VQAScore": ">>>>> ><>> <>> >> >", "people": ">>>>> >=>> =>> >> >"},
    "DALL·E 3 Eval": {
        "Gecko": "<<=>= =>>> =>> >> =",
        "VQAScore": ">>>>> >=>> =>> >> =",
        "people": "=>=>> ==>> =>> >> >",
    },
}


def orders(prompts: str, judge: str) -> dict[tuple[str, str], int]:
    """1, -1 or 0 of each pair of models, by figure 11."""
    signs = ORDERS[prompts][judge].replace(" ", "")
    return {pair: "<=>".index(sign) - 1 for pair, sign in zip(combinations(JUDGED, 2), signs, strict=True)}
