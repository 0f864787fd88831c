# mm_moslora for NVIDIA GPUs: docker build -t mm_moslora . && docker run --gpus all -v $PWD:/work mm_moslora train recipe.yaml
# PyPI's torch brings CUDA's libraries; the machine has the driver and the NVIDIA container toolkit.
FROM python:3.12-slim
# Triton and DeepSpeed compile small parts when they first need them.
RUN apt-get update && apt-get install -y --no-install-recommends gcc g++ git && rm -rf /var/lib/apt/lists/*
COPY . /opt/mm_moslora
RUN pip install --no-cache-dir --constraint /opt/mm_moslora/constraints.txt "/opt/mm_moslora[serve,quant,video]"
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /work
ENTRYPOINT ["mm-moslora"]
