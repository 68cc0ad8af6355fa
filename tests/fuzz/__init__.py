"""Fuzzing: properties that hold for whatever comes in, tried on thousands of cases that nobody has written down.

    make check   a few of each, always the same ones
    make fuzz    more than 100,000, others each time; counts them, and prints how to play a failing one again

A file a subject: what comes in. Beside them: strategies.py makes the cases, services.py what services say,
promises.py says what holds for every answer, place.py runs a command in a place that nothing leaves. A package, for its
own conftest.py.
"""
