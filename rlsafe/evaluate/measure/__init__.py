"""From judged answers to rates with intervals, and to the files of an evaluation."""
