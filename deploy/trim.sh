#!/bin/sh
# Remove from an environment what the server never reads: symbols for debuggers, which are three quarters of llama.cpp,
# and all files of Swagger UI except those of /docs and its licence.
set -eu
packages=$(echo "$1"/lib/python3.*/site-packages)
find "$packages" -type f -name '*.so' -exec strip --strip-unneeded {} +
find "$packages/swagger_ui/static" -type f ! -name swagger-ui.css ! -name swagger-ui-bundle.js \
    ! -name favicon-32x32.png ! -name LICENSE -delete
