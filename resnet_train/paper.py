"""Published numbers of the paper, as data. Errors in %."""

# Table 6: test error of the residual nets on CIFAR-10 (option A; 110 layers: the best of five, 6.61 +- 0.16).
CIFAR10_TEST_ERROR = {20: 8.75, 32: 7.51, 44: 7.17, 56: 6.97, 110: 6.43, 1202: 7.93}
