// Embeds images in C++ with OpenCV 4.6 or newer: opencv_client MODEL.onnx OUT.csv IMAGE...
// MODEL.onnx is one of `pmm export onnx`; MODEL.onnx.json must lie beside it.
#include <algorithm>
#include <cmath>
#include <fstream>
#include <iomanip>
#include <iostream>
#include <iterator>
#include <sstream>
#include <string>
#include <vector>

#include <opencv2/dnn.hpp>
#include <opencv2/imgcodecs.hpp>
#include <opencv2/imgproc.hpp>

// The numbers behind "key" in the manifest's section on preprocessing; where you have a JSON library, take that.
static std::vector<double> numbers(const std::string& manifest, const std::string& key) {
    const size_t at = manifest.find('"' + key + "\":", manifest.rfind("\"preprocessing\":"));
    if (at == std::string::npos) throw std::runtime_error("the manifest says nothing of " + key);
    std::string text = manifest.substr(at + key.size() + 3);
    text.resize(text.find_first_of(text[0] == '[' ? "]" : ",}"));
    std::replace_if(text.begin(), text.end(), [](char c) { return c == '[' || c == ','; }, ' ');
    std::istringstream stream(text);
    return {std::istream_iterator<double>(stream), {}};
}

// Pillow's bilinear along the rows, to the bit. cv::resize takes two pixels where this one takes all of them, so that
// crops which shrink come out differently.
static cv::Mat resize_width(const cv::Mat& image, int width) {
    const double scale = double(image.cols) / width, support = std::max(scale, 1.0);
    const int bits = 22;
    cv::Mat out(image.rows, width, CV_8UC3);
    for (int x = 0; x < width; ++x) {
        const double centre = (x + 0.5) * scale;
        const int first = std::max(0, int(centre - support + 0.5));
        const int last = std::min(image.cols, int(centre + support + 0.5));
        std::vector<double> weights;
        double total = 0;
        for (int i = first; i < last; ++i) {
            weights.push_back(std::max(0.0, 1 - std::abs((i - centre + 0.5) * (1 / support))));
            total += weights.back();
        }
        for (int y = 0; y < image.rows; ++y) {
            int sums[3] = {1 << (bits - 1), 1 << (bits - 1), 1 << (bits - 1)};
            for (int i = first; i < last; ++i)
                for (int c = 0; c < 3; ++c)
                    sums[c] += image.at<cv::Vec3b>(y, i)[c] * int(weights[i - first] / total * (1 << bits) + 0.5);
            for (int c = 0; c < 3; ++c) out.at<cv::Vec3b>(y, x)[c] = cv::saturate_cast<uchar>(sums[c] >> bits);
        }
    }
    return out;
}

int main(int argc, char** argv) try {
    if (argc < 4) throw std::runtime_error("usage: opencv_client MODEL.onnx OUT.csv IMAGE...");
    std::ifstream file(std::string(argv[1]) + ".json");
    if (!file) throw std::runtime_error("no manifest: " + std::string(argv[1]) + ".json");
    const std::string manifest(std::istream_iterator<char>(file), {});  // without its white space
    const auto says = [&](const char* fact) { return manifest.find(fact) != std::string::npos; };
    if (!says("\"interpolation\":\"bilinear\"") || !says("\"antialias\":true") || !says("\"padding\":null"))
        throw std::runtime_error("the manifest asks for another resize than Pillow's bilinear, stretched");
    const int height = int(numbers(manifest, "height").at(0)), width = int(numbers(manifest, "width").at(0));
    const auto mean = numbers(manifest, "mean"), std = numbers(manifest, "std");
    const bool planes = says("\"layout\":\"NCHW\""), normalise = says("\"normalised_by\":\"caller\"");

    std::vector<cv::Mat> crops;
    for (int i = 3; i < argc; ++i) {
        cv::Mat image = cv::imread(argv[i], cv::IMREAD_COLOR), turned;  // upright, as its EXIF data says
        if (image.empty()) throw std::runtime_error(std::string("no image: ") + argv[i]);
        cv::cvtColor(image, image, cv::COLOR_BGR2RGB);
        cv::transpose(resize_width(image, width), turned);
        cv::transpose(resize_width(turned, height), image);
        if (planes) image.convertTo(image, CV_32F, normalise ? 1 / 255.0 : 1);
        if (normalise) cv::subtract(image, cv::Scalar(mean.at(0), mean.at(1), mean.at(2)), image);
        if (normalise) cv::divide(image, cv::Scalar(std.at(0), std.at(1), std.at(2)), image);
        if (says("\"colour\":\"bgr\"")) cv::cvtColor(image, image, cv::COLOR_RGB2BGR);
        crops.push_back(image);
    }
    cv::Mat images;  // float [N, 3, height, width], or bytes [N, height, width, 3]
    if (planes) images = cv::dnn::blobFromImages(crops);
    else cv::vconcat(crops, images), images = images.reshape(1, {int(crops.size()), height, width, 3});

    cv::dnn::Net net = cv::dnn::readNetFromONNX(argv[1]);
    net.setInput(images);
    const cv::Mat embeddings = net.forward();  // [N, dim]
    std::ofstream out(argv[2]);
    out << std::setprecision(9);
    for (int row = 0; row < embeddings.size[0]; ++row)
        for (int i = 0; i < embeddings.size[1]; ++i)
            out << embeddings.at<float>(row, i) << (i + 1 < embeddings.size[1] ? ',' : '\n');
    out.close();
    if (!out) throw std::runtime_error(std::string("cannot write ") + argv[2]);
    return 0;
} catch (const std::exception& error) {
    std::cerr << error.what() << '\n';
    return 1;
}
