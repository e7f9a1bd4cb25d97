#pragma once

#include <cstdint>
#include <string>
#include <vector>

// 8-bit RGB, row by row.
struct Image {
  int64_t height = 0, width = 0;
  std::vector<uint8_t> pixels;
};

// Reads a PPM (P6), PNG or JPEG file, by its first bytes. Throws std::runtime_error that names the file.
Image read_image(const std::string& path);
