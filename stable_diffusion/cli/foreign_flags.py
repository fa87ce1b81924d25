"""Flags of other programs and what is given here in place of them.

Those are CompVis' scripts and their optimized forks, diffusers' arguments, AUTOMATIC1111's API, InvokeAI,
stable-diffusion.cpp, candle, mflux and the like, and programs that train.
Names are written with underscores, without hyphens before them.
"""

_NAMES = {  # ours, or what to do: theirs
    "--prompt_file": "from_file prompts prompts_file batch_prompts_file file",
    "--negative_prompt": "uncond_prompt nprompt negprompt neg_prompt negative n_prompt negative_text",
    "--width": "W img_width image_width",
    "--height": "H img_height image_height",
    "--width and --height": "size resolution image_size image_dim dims d",
    "--n_images": (
        "n_samples num_samples num_images num_images_per_prompt n_iter batch_count iterations number count b "
        "auto_seeds repeat num_outputs"
    ),
    "--batch_size": "bsize bs",
    "--seed": "S rng_seed manual_seed global_seed seeds",
    "--variation_seed": "subseed",
    "--variation_strength": "subseed_strength variation_seed_strength variation_amount",
    "--fixed_seed": "fixed_code share_seed",
    "--steps": "n_steps num_steps ddim_steps num_inference_steps inference_steps sample_steps sampling_steps",
    "--cfg": "scale guidance guidance_scale cfg_scale cfg_weight unconditional_guidance_scale",
    "--image_cfg": "img_cfg_scale image_cfg_scale image_guidance_scale cfg_image",
    "--guidance_rescale": "rescale_cfg cfg_rescale cfg_rescale_multiplier",
    "--sampler": "sampler_name sampling_method A",
    "--sampler, and its curve --schedule": "scheduler",
    "--sampler ddim": "ddim",
    "--sampler pndm": "plms",
    "--sampler lms": "klms",
    "--sampler dpmpp_2m": "dpm dpm_solver",
    "--schedule": "scheduler_type schedule_type noise_schedule",
    "--schedule karras": "karras use_karras_sigmas karras_sigmas",
    "--eta": "ddim_eta",
    "--strength": "denoise denoising_strength denoise_strength img2img_strength prompt_strength",
    "--strength (1 leaves nothing of the image)": "image_strength init_image_strength",
    "--mask": "mask_image mask_path mask_img init_mask masked_image_path",
    "--mask_padding": "inpaint_full_res_padding inpaint_full_res padding_mask_crop",
    "--invert_mask": "inpainting_mask_invert",
    "--original_size": "original_width original_height",
    "--crop": "crops_coords_top_left crop_top crop_left",
    "--negative_crop": "negative_crops_coords_top_left",
    "--target_size": "target_width target_height",
    "--aesthetic_score": "positive_aesthetic_score ascore",
    "--expand": "outpaint outpainting image_outpaint_padding outcrop",
    "--controlnet": "control_net controlnet_model controlnet_path controlnet_model_path",
    "--controlnet NET:SCALE": "control_strength controlnet_strength controlnet_conditioning_scale control_scale",
    "--control_image": "controlnet_image controlnet_image_path conditioning_image hint hint_image",
    "--control_start": "control_guidance_start",
    "--control_end": "control_guidance_end",
    "--ip_adapter": "ip_adapter_path ip_adapter_model ip_adapter_weight_name",
    "--ip_adapter NET:SCALE": "ip_adapter_scale ip_scale ip_adapter_strength",
    "--ip_image": "ip_adapter_image ip_adapter_images ip_adapter_image_path image_prompt image_prompts",
    "--ip_mask": "ip_adapter_mask ip_adapter_masks",
    "--hires FACTOR": "hr_scale enable_hr hires_fix upscale_by",
    "--hires_strength": "hr_denoising_strength",
    "--hires_steps": "hr_second_pass_steps",
    "--hires_upscaler": "hr_upscaler",
    "--refiner": "refiner_checkpoint refiner_model",
    "--refiner_start": "refiner_switch_at high_noise_frac",
    "--model": (
        "m ckpt checkpoint ckpt_path ckpt_dir checkpoint_path model_path model_id model_name model_dir repo "
        "repo_id pretrained_model_name_or_path weights sd_version base_model sd_model path"
    ),
    "--unet": "unet_weights unet_path diffusion_model",
    "--vae": "vae_weights vae_path",
    "--text_encoder": "clip_weights clip_l",
    "--text_encoder_2": "clip2_weights clip_g",
    "--lora FILE:SCALE": (
        "lora_paths lora_path lora_weights lora_model loras lora_scales lora_scale lora_name lora_repo_id"
    ),
    "--lora_dir": "lora_model_dir lora_directory lora_path_dir",
    "--embedding": "embd_dir embeddings embeddings_dir embedding_path textual_inversion",
    "--prediction": "prediction_type parameterization v_parameterization",
    "--unet_bits": "bits load_in_8bit load_in_4bit qtype",
    "--low_memory": (
        "low_ram lowram low_vram lowvram medvram medvram_sdxl vae_tiling offload_to_cpu vae_on_cpu "
        "clip_on_cpu control_net_cpu sliced_attention_size attention_slicing enable_attention_slicing "
        "enable_model_cpu_offload cpu_offload"
    ),
    "--memory_limit": "mlx_cache_limit_gb cache_limit max_memory",
    "--device gpu": "cuda mps metal gpu",
    "--cpu": "use_cpu",
    "--dtype float32": "no_half full_precision fp32 f32 float32 force_fp32",
    "--dtype float16": "half fp16 f16 float16 use_f16 force_fp16",
    "--dtype bfloat16": "bf16 bfloat16",
    "--dtype float32, float16 or bfloat16": "precision type torch_dtype",
    "--output": "o final_image output_path output_file outfile outpath save_path",
    "--output FOLDER/": "outdir output_dir out_dir output_folder save_dir",
    "--no_grid": "skip_grid no_save_grid nogrid dont_save_grid",
    "--from_image": "config_from_metadata from_metadata init_from",
    "--preview": "preview_path intermediary_images stepwise_image_output_dir save_intermediates",
    "--preview_every": "preview_interval preview_steps",
    "--preview_vae": "taesd tae",
    'give the image as the first word: image2image IMAGE "prompt"': (
        "i I init init_img init_image image image_path img img2img image_paths input input_image"
    ),
    "programs differ in what it means; write --n_images or --negative_prompt": "n",
    "programs differ in what it means; write --seed or --steps": "s",
    "leave it out, memory and speed are decided here": (
        "turbo unet_bs xformers use_flash_attn flash_attn fa diffusion_fa t opt_sdp_attention "
        "opt_split_attention threads mmap tracing channels_last"
    ),
    "leave it out, the model decides it": "config C f laion400m",
    "leave it out, there is no safety checker": "safety_checker disable_safety_checker no_nsfw_filter nsfw_checker",
    "leave it out, images always say how they were made": "metadata save_metadata",
    "write it as the suffix of --output: .png, .jpg or .webp": "format image_format output_format",
}
_TRAINING_NAMES = {  # those of kohya's scripts, diffusers' examples, mlx-examples and mflux
    "--rank": "network_dim lora_rank dim r",
    "--alpha": "network_alpha lora_alpha",
    "--conv_rank": "conv_dim",
    "--targets": "target_modules lora_blocks lora_layers",
    "--text_encoder_rank N": "train_text_encoder text_encoder_lr",
    "--dora": "use_dora",
    "--steps": "max_train_steps train_steps iterations n_steps num_steps iters",
    "--steps, which counts updates": "num_train_epochs max_train_epochs epochs",
    "--batch_size": "train_batch_size",
    "--accumulate": "gradient_accumulation_steps grad_accumulate",
    "--learning_rate": "lr unet_lr",
    "--lr_schedule": "lr_scheduler",
    "--warmup FRACTION": "lr_warmup_steps warmup_steps",
    "--optimizer": "optimizer_type use_8bit_adam",
    "--weight_decay": "adam_weight_decay",
    "--clip_norm": "max_grad_norm",
    "--loss": "loss_type",
    "--min_snr": "min_snr_gamma snr_gamma",
    "--ema DECAY": "use_ema ema_decay",
    "--checkpointing on": "gradient_checkpointing",
    "--flip": "random_flip flip_aug",
    "--caption_dropout": "caption_dropout_rate proportion_empty_prompts",
    "--trigger": "instance_prompt trigger_word token_string",
    "--cache DIR": "cache_latents cache_latents_to_disk cache_text_encoder_outputs",
    "--prior": "class_data_dir reg_data_dir num_class_images with_prior_preservation",
    "--prior_prompt": "class_prompt",
    "--prior_weight": "prior_loss_weight",
    "--preview": "validation_prompt sample_prompts progress_prompt",
    "--preview_every": "validation_steps sample_every_n_steps progress_every",
    "--save_every": "checkpointing_steps save_every_n_steps checkpoint_every",
    "--keep": "checkpoints_total_limit save_last_n_steps",
    "--resume latest, or --resume FILE": "resume_from_checkpoint",
    "--output NAME.safetensors": "output_dir output_name",
    "--config": "config_file dataset_config train_config",
    "--model": "pretrained_model_name_or_path base_model model_path",
    "--dtype": "mixed_precision precision",
    "give the folder of pictures as the first word": "train_data_dir instance_data_dir dataset_name dataset data_dir",
}
COUNTERPARTS, TRAINING_COUNTERPARTS = (
    {name: text for text, names in table.items() for name in names.split()} for table in (_NAMES, _TRAINING_NAMES)
)
