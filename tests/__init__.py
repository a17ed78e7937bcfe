"""The tests of engine, tools, studies and workshop, one file a module."""
