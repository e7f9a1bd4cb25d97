#pragma once

// The library is built with hidden visibility; this marks what it exports.
#define PYINVOLUTION_API __attribute__((visibility("default")))
