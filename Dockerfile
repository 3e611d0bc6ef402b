# Serves an exported classifier: docker build -t dynaconv . && docker compose up
# No torch inside: the image runs an ONNX file by onnxruntime, as an ordinary user on a read-only file system.
FROM python:3.11-slim AS build
WORKDIR /build
COPY constraints.txt ./
RUN python -m venv /srv/dynaconv \
 && /srv/dynaconv/bin/pip install --no-cache-dir -c constraints.txt \
    numpy pillow pyarrow filelock rich tyro onnxruntime fastapi uvicorn python-multipart prometheus-client flit_core
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN /srv/dynaconv/bin/pip install --no-cache-dir --no-deps --no-build-isolation .

FROM python:3.11-slim
COPY --from=build /srv/dynaconv /srv/dynaconv
RUN useradd --uid 10001 --no-create-home dynaconv
USER 10001
ENV PATH=/srv/dynaconv/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=10s \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/readyz', timeout=2)"]
# DYNACONV_TOKEN must be set: the server can be reached from outside the container.
CMD ["dynaconv", "serve", "/model/model.onnx", "--host", "0.0.0.0", "--port", "8000"]
