"""What the tests of all backends check, by name: functions that call fastalign on the backend in force and
compare with fp64.

The contract tests call them with the shapes of the contract, the emulator's and the instruction sets' tests
with shapes that reach every path of their kernels."""
