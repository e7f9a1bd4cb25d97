#include "image.h"

#include <csetjmp>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iterator>
#include <limits>
#include <sstream>
#include <stdexcept>

#if WITH_PNG
#include <png.h>
#endif
#if WITH_JPEG
#include <jpeglib.h>
#endif

namespace {

using Bytes = std::vector<uint8_t>;

Image with_size(int64_t height, int64_t width) {
  if (height < 1 || width < 1 || height > 1 << 16 || width > 1 << 16)
    throw std::runtime_error("its size is " + std::to_string(width) + " x " + std::to_string(height) +
                             ", expected 1 to 65536 each way");
  Image image{height, width, {}};
  image.pixels.resize(size_t(3 * height * width));
  return image;
}

// "P6", width, height and the largest value as text with comments, one white space, then the pixels.
Image read_ppm(const Bytes& bytes) {
  std::istringstream text(std::string(bytes.begin(), bytes.end()));
  text.ignore(2);
  const auto number = [&] {
    int64_t value = -1;
    while ((text >> std::ws).peek() == '#') text.ignore(std::numeric_limits<std::streamsize>::max(), '\n');
    text >> value;
    return value;
  };
  const int64_t width = number(), height = number(), most = number();
  if (most != 255) throw std::runtime_error("its largest value is " + std::to_string(most) + ", expected 255");
  Image image = with_size(height, width);
  text.ignore(1);
  if (!text.read(reinterpret_cast<char*>(image.pixels.data()), std::streamsize(image.pixels.size())))
    throw std::runtime_error("it is cut off");
  return image;
}

#if WITH_PNG
Image read_png(const Bytes& bytes) {
  png_image png{};
  png.version = PNG_IMAGE_VERSION;
  if (!png_image_begin_read_from_memory(&png, bytes.data(), bytes.size())) throw std::runtime_error(png.message);
  png.format = PNG_FORMAT_RGB;
  Image image = with_size(png.height, png.width);
  if (!png_image_finish_read(&png, nullptr, image.pixels.data(), 0, nullptr)) throw std::runtime_error(png.message);
  return image;
}
#endif

#if WITH_JPEG
struct JpegError {
  jpeg_error_mgr manager;
  std::jmp_buf jump;
  char message[JMSG_LENGTH_MAX];
};

// libjpeg reports errors by a function that must not return: it jumps, past nothing that has a destructor.
bool decode_jpeg(const Bytes& bytes, jpeg_decompress_struct& jpeg, JpegError& error, Image& image, bool header) {
  if (setjmp(error.jump)) return false;
  if (header) {
    jpeg_create_decompress(&jpeg);
    jpeg_mem_src(&jpeg, bytes.data(), static_cast<unsigned long>(bytes.size()));
    jpeg_read_header(&jpeg, TRUE);
    jpeg.out_color_space = JCS_RGB;
    jpeg_start_decompress(&jpeg);
    return true;
  }
  while (jpeg.output_scanline < jpeg.output_height) {
    JSAMPROW row = image.pixels.data() + 3 * size_t(image.width) * jpeg.output_scanline;
    jpeg_read_scanlines(&jpeg, &row, 1);
  }
  jpeg_finish_decompress(&jpeg);
  return true;
}

Image read_jpeg(const Bytes& bytes) {
  jpeg_decompress_struct jpeg{};
  JpegError error{};
  jpeg.err = jpeg_std_error(&error.manager);
  error.manager.error_exit = [](j_common_ptr common) {
    auto* own = reinterpret_cast<JpegError*>(common->err);
    common->err->format_message(common, own->message);
    std::longjmp(own->jump, 1);
  };
  Image image;
  bool good = decode_jpeg(bytes, jpeg, error, image, true);
  if (good) {
    image = with_size(jpeg.output_height, jpeg.output_width);
    good = decode_jpeg(bytes, jpeg, error, image, false);
  }
  jpeg_destroy_decompress(&jpeg);
  if (!good) throw std::runtime_error(error.message);
  return image;
}
#endif

Image decode(const Bytes& bytes) {
  const auto begins = [&](const char* magic, size_t length) {
    return bytes.size() >= length && std::memcmp(bytes.data(), magic, length) == 0;
  };
  if (begins("P6", 2)) return read_ppm(bytes);
#if WITH_PNG
  if (begins("\x89PNG", 4)) return read_png(bytes);
#endif
#if WITH_JPEG
  if (begins("\xff\xd8\xff", 3)) return read_jpeg(bytes);
#endif
  throw std::runtime_error(
      "it is of no kind that this program was built for: PPM"
#if WITH_PNG
      ", PNG"
#endif
#if WITH_JPEG
      ", JPEG"
#endif
  );
}

}  // namespace

Image read_image(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("there is no file " + path);
  const Bytes bytes{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  try {
    return decode(bytes);
  } catch (const std::runtime_error& error) {
    throw std::runtime_error("cannot read " + path + ": " + error.what());
  }
}
