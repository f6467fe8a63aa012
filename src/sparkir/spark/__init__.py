"""SPARK: where, and how strongly, the student should imitate the teacher."""
